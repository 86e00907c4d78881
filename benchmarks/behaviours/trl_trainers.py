"""The trainers of TRL."""
