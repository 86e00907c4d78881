"""Where weights live: several devices, offloading, several processes."""
