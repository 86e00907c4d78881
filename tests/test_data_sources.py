"""The benchmark's data sets: the formats are read as their authors define them, and no split knows another one."""

import bz2
import hashlib
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.quality.data_sources import (
    debian_section,
    debian_synopsis,
    django_french,
    downloads,
    opening_hours,
    prepare,
)
from benchmarks.quality.data_sources.debian_index import (
    Package,
    choose_one_per_source,
    format_description,
    is_program,
    parse_packages,
    parse_stanzas,
)
from benchmarks.quality.data_sources.place_facts import NAME_ENDS, NAME_STARTS, Block, Draw, Place, Span, list_names
from benchmarks.quality.data_sources.place_prose import TIME_STYLES, describe_place
from benchmarks.quality.data_sources.place_questions import ASKERS
from benchmarks.quality.data_sources.splits import (
    build_shingles,
    check_splits,
    cut_splits,
    find_similar_pairs,
    is_complete,
    merge_pairs,
    split_words,
    write_splits,
)

TRANSLATION = """\
Package: quern
Description-md5: 0123
Description-en: hand mill for grain
 Quern grinds grain between
 two stones.
 .
 It offers:
  * a handle, which is
    made of oak
  * a spout

Package: quern-doc
Description-md5: 4567
Description-en: hand mill for grain (manual)
 The manual.

Package: quern
Description-md5: 89ab
Description-en: an older text
 Not that of the package.
"""
PACKAGES = """\
Package: quern
Source: mills (1.2-3)
Version: 1.2-3+b1
Depends: libc6,
 libstone
Description: hand mill for grain
Description-md5: 0123
Section: utils

Package: quern-doc
Source: mills
Description-md5: 4567
Section: doc

Package: orphan
Description-md5: ffff
Section: misc
"""
CATALOGUE = """\
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Save the new page"
msgstr "Enregistrer la nouvelle page"

msgid ""
"The file “%(name)s” "
"is too large."
msgstr ""
"Le fichier «\u00a0%(name)s\u00a0» "
"est trop volumineux."

msgctxt "button"
msgid "save the new page"
msgstr "Sauver la nouvelle page"

msgid "%(count)d page was removed"
msgid_plural "%(count)d pages were removed"
msgstr[0] "%(count)d page a été supprimée"
msgstr[1] "%(count)d pages ont été supprimées"

#, fuzzy
msgid "Remove the old page"
msgstr "Enregistrer la vieille page"

msgid "Nobody has translated this"
msgstr ""

msgid "From %(start)s until %(end)s"
msgstr "De %(start)s à %(end)s"

msgid "A <b>bold</b> new page"
msgstr "Une nouvelle page en <b>gras</b>"

msgid "Page %s was moved"
msgstr "La page a été déplacée"

msgid "Two words"
msgstr "Deux mots seulement"

#~ msgid "This message is gone"
#~ msgstr "Ce message a disparu"
"""
WORDS = [a + b for a, b in itertools.product(NAME_STARTS, NAME_ENDS)]


def draw_words(draw: Draw, count: int) -> str:
    return " ".join(draw.pick(WORDS) for _ in range(count))


def invent_packages(count: int, sections: tuple[str, ...] = ("utils",)) -> list[Package]:
    draw = Draw("packages")
    return [
        Package(f"tool{i}", f"source{i}", sections[i % len(sections)], draw_words(draw, 5), draw_words(draw, 60) + ".")
        for i in range(count)
    ]


def test_stanzas_join_their_continuation_lines_and_end_at_an_empty_line():
    stanzas = list(parse_stanzas(PACKAGES.splitlines()))
    assert [stanza["Package"] for stanza in stanzas] == ["quern", "quern-doc", "orphan"]
    assert stanzas[0]["Depends"] == "libc6,\n libstone"
    assert stanzas[0]["Description-md5"] == "0123"
    assert list(parse_stanzas(["A: 1\r\n", "\n", "\n", "A: 2"])) == [{"A": "1"}, {"A": "2"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [([" lost"], r"Line 1 continues no field: ' lost'"), (["A: 1", "lost"], r"Line 2 is neither .*'lost'")],
)
def test_lines_outside_the_format_are_named(lines, message):
    with pytest.raises(ValueError, match=message):
        list(parse_stanzas(lines))


def test_packages_get_the_description_with_their_checksum():
    packages = parse_packages(PACKAGES, TRANSLATION)
    assert [package.name for package in packages] == ["quern", "quern-doc"]
    assert packages[0] == Package(
        "quern",
        "mills",
        "utils",
        "hand mill for grain",
        "Quern grinds grain between two stones.\nIt offers:\n* a handle, which is made of oak\n* a spout",
    )


def test_the_description_keeps_paragraphs_and_bullets_but_no_line_breaks():
    assert (
        format_description(" one\n two\n .\n three\n - four\n   five\n - six") == "one two\nthree\n- four five\n- six"
    )


@pytest.mark.parametrize(
    ("name", "section", "synopsis", "expected"),
    [
        ("quern", "utils", "hand mill", True),
        ("libquern2", "utils", "hand mill", False),
        ("quern-dev", "devel", "hand mill", False),
        ("quern-dbg", "utils", "hand mill", False),
        ("quern-data", "utils", "hand mill", False),
        ("quern-manual", "doc", "hand mill", False),
        ("quern2", "oldlibs", "hand mill", False),
        ("quern3", "utils", "Transitional package for quern", False),
    ],
)
def test_packages_without_a_text_of_their_own_are_dropped(name, section, synopsis, expected):
    assert is_program(Package(name, "mills", section, synopsis, "Quern grinds.")) is expected


def test_one_package_of_a_source_is_kept_whatever_the_order():
    packages = [Package(name, "mills", "utils", "s", "d") for name in ("quern-extra", "quern", "mills", "sift")]
    for order in itertools.permutations(packages):
        assert [package.name for package in choose_one_per_source(order)] == ["mills"]
    assert choose_one_per_source(packages[:2])[0].name == "quern"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 1.0])
def test_similar_pairs_are_those_of_comparing_everything(threshold):
    draw = Draw("pairs")
    features = [frozenset(draw.pick(WORDS[:12]) for _ in range(draw.number(1, 8))) for _ in range(150)]
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(len(features)), 2)
        if len(features[i] & features[j]) / len(features[i] | features[j]) >= threshold - 1e-9
    }
    found = list(find_similar_pairs(features, threshold))
    assert set(found) == expected and len(found) == len(expected)


def test_groups_are_what_pairs_connect():
    assert merge_pairs(6, [(4, 5), (1, 2), (2, 4)]) == [0, 1, 1, 3, 1, 1]
    for pairs in itertools.permutations([(0, 2), (1, 2), (1, 4), (5, 4)]):
        assert merge_pairs(6, pairs) == [0, 0, 0, 3, 0, 0]


def test_synopses_have_the_right_lengths_and_no_source_or_text_twice():
    packages = invent_packages(60)
    twin = packages[0]._replace(name="tool0-gtk", synopsis="another one of the same source")
    copy = packages[1]._replace(name="copy", source="copy", synopsis="the same text in another place")
    short = packages[2]._replace(name="short", source="short", description="Too short.")
    long = packages[3]._replace(name="long", source="long", description=draw_words(Draw("long"), 161))
    terse = packages[4]._replace(name="terse", source="terse", synopsis="hand mill")
    repeated = packages[5]._replace(name="repeated", source="repeated")
    repeated = repeated._replace(description=f"{repeated.synopsis} {draw_words(Draw('repeated'), 50)}")
    everything = [*packages, twin, copy, short, long, terse, repeated]
    splits = debian_synopsis.build_splits(everything, {"train": 40, "dev": 10, "test": 10})
    check_splits("synopsis", splits)
    rows = [row for split in splits.values() for row in split]
    assert {row["source"] for row in rows} == {package.description for package in packages}
    assert {row["references"][0] for row in rows}.isdisjoint({twin.synopsis, terse.synopsis})
    shuffled = sorted(everything, key=lambda package: hashlib.md5(package.name.encode()).hexdigest())
    sizes = {"train": 40, "dev": 10, "test": 10}
    assert debian_synopsis.build_splits(shuffled, sizes) == splits


def test_no_section_fills_more_than_its_share_of_the_synopses(monkeypatch):
    monkeypatch.setattr(debian_synopsis, "ROWS_PER_SECTION", 7)
    packages = invent_packages(40, ("python", "python", "python", "utils"))
    splits = debian_synopsis.build_splits(packages, {"train": 10, "dev": 2, "test": 2})
    sections = {package.description: package.section for package in packages}
    assert Counter(sections[row["source"]] for split in splits.values() for row in split) == {"python": 7, "utils": 7}


def test_sections_are_balanced_in_every_split():
    packages = invent_packages(200, (*debian_section.SECTIONS, "python", "oldlibs"))
    packages = [package._replace(description=draw_words(Draw(package.name), 12) + ". More.") for package in packages]
    sizes = {"train": 80, "dev": 16, "test": 16}
    splits = debian_section.build_splits(packages, sizes)
    check_splits("section", splits)
    for split, size in sizes.items():
        counts = Counter(row["label"] for row in splits[split])
        assert counts == dict.fromkeys(debian_section.SECTIONS, size // 8)
        assert all(row["references"] == [row["label"]] for row in splits[split])
        assert not any("More" in row["source"] for row in splits[split])
        # The rows of a section do not come in one piece.
        assert len({row["label"] for row in splits[split][:10]}) > 2
    with pytest.raises(ValueError, match="multiples of 8"):
        debian_section.build_splits(packages, {"train": 81})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("quern", "Quern grinds. QUERN2 too, querns not.", "[name] grinds. [name] too, querns not."),
        ("stone-quern", "Stone Quern, stone_quern and StoneQuern", "[name], [name] and [name]"),
        ("python3-quern", "the quern module", "the [name] module"),
        ("quern++", "quern++ and quern", "[name] and [name]"),
        ("at", "at looks at AT", "[name] looks [name] AT"),
    ],
)
def test_names_are_hidden_in_every_spelling(name, text, expected):
    assert debian_section.hide_name(text, name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two.", "One."),
        ("Version 1.2 of it. Two.", "Version 1.2 of it."),
        ("Mills, e.g. Querns. Two.", "Mills, e.g. Querns."),
        ("No end", "No end"),
        ("First\n* second. Third", "First"),
    ],
)
def test_the_first_sentence(text, expected):
    assert debian_section.find_first_sentence(text) == expected


def test_catalogues_give_whole_messages_with_all_their_translations():
    assert django_french.parse_messages([CATALOGUE]) == {
        "Save the new page": ["Enregistrer la nouvelle page", "Sauver la nouvelle page"],
        "The file “%(name)s” is too large.": ["Le fichier « %(name)s » est trop volumineux."],
    }


def test_similar_messages_stay_in_one_split():
    draw = Draw("messages")
    messages = {}
    for _ in range(150):
        english, french = draw_words(draw, 6), draw_words(draw, 6)
        for extra in draw.shuffle(WORDS)[: draw.number(1, 3)]:
            messages[f"{english} {extra}"] = [f"{french} {extra}"]
    messages["Alpha beta gamma"], messages["Delta epsilon zeta"] = ["un deux trois"], ["un deux trois"]
    splits = django_french.build_splits(messages)
    check_splits("messages", splits)
    assert sum(map(len, splits.values())) == len(messages)
    assert abs(len(splits["test"]) / len(messages) - 0.15) < 0.02
    assert abs(len(splits["dev"]) / len(messages) - 0.10) < 0.02
    rows = [(split, row) for split, rows in splits.items() for row in rows]
    for read in (lambda row: row["source"], lambda row: row["references"][0]):
        features = [frozenset(split_words(read(row))) for _, row in rows]
        pairs = list(find_similar_pairs(features, django_french.SIMILARITY))
        assert pairs and all(rows[i][0] == rows[j][0] for i, j in pairs)


def test_a_wheel_is_read_and_another_file_is_refused(tmp_path):
    wheel = downloads.Wheel("mills", "1.0", "mills-1.0-py3-none-any.whl", "")
    with zipfile.ZipFile(tmp_path / wheel.file_name, "w") as file:
        file.writestr("mills/locale/fr/LC_MESSAGES/django.po", CATALOGUE)
        file.writestr("mills/locale/de/LC_MESSAGES/django.po", "not read")
    checksum = hashlib.sha256((tmp_path / wheel.file_name).read_bytes()).hexdigest()
    path = downloads.read_wheel(wheel._replace(sha256=checksum), tmp_path)
    assert django_french.read_catalogues(path) == [CATALOGUE]
    with pytest.raises(ValueError, match=rf"mills-1\.0-py3-none-any\.whl has the SHA-256 {checksum}, expected 00"):
        downloads.read_wheel(wheel._replace(sha256="00"), tmp_path)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".xz", lzma.compress), (".bz2", bz2.compress)], ids=["plain", "xz", "bz2"]
)
def test_an_index_is_read_compressed_or_not_and_another_one_is_refused(suffix, compress, tmp_path):
    index = downloads.TRANSLATION._replace(sha256=hashlib.sha256(TRANSLATION.encode()).hexdigest())
    directory = tmp_path / downloads.DEBIAN_DIRECTORY
    directory.mkdir()
    (directory / f"Translation-en{suffix}").write_bytes(compress(TRANSLATION.encode()))
    assert downloads.read_debian_index(index, tmp_path) == TRANSLATION
    (directory / f"Translation-en{suffix}").write_bytes(compress(TRANSLATION.replace("oak", "elm").encode()))
    with pytest.raises(ValueError, match=r"has the SHA-256 .* It is not of Debian 12\.15"):
        downloads.read_debian_index(index, tmp_path)


def test_half_a_download_is_named(tmp_path):
    directory = tmp_path / downloads.DEBIAN_DIRECTORY
    directory.mkdir()
    (directory / "Packages.xz").write_bytes(lzma.compress(PACKAGES.encode())[:40])
    with pytest.raises(ValueError, match=r"Packages.xz cannot be decompressed"):
        downloads.read_debian_index(downloads.PACKAGES, tmp_path)


def test_a_missing_or_failing_program_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"no program 'no-such-program' here. Do it by hand"):
        downloads.run_command(["no-such-program"], "Do it by hand.")
    with pytest.raises(RuntimeError, match=r"(?s)failed: \.\.\..*out of grain.*Do it by hand"):
        downloads.run_command([sys.executable, "-c", "raise SystemExit('out of grain')"], "Do it by hand.")


def test_names_belong_to_one_split():
    names = [set(list_names(split)) for split in ("train", "dev", "test")]
    assert all(names) and not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    with pytest.raises(ValueError, match="no split 'held-out'"):
        list_names("held-out")
    splits = opening_hours.build_splits({"train": 60, "dev": 36, "test": 36})
    check_splits("opening hours", splits)
    for split, own in zip(("train", "dev", "test"), names, strict=True):
        used = {word for row in splits[split] for word in re.findall(r"\w+", str(row))} & set(WORDS)
        assert used and used <= own


def test_opening_hours_do_not_change():
    splits = opening_hours.build_splits({"train": 24, "dev": 12, "test": 12})
    assert splits == opening_hours.build_splits({"train": 24, "dev": 12, "test": 12})
    # More rows change none of the first ones.
    assert opening_hours.build_splits({"train": 30})["train"][:24] == splits["train"]
    assert Counter(row["kind"] for row in splits["train"]) == dict.fromkeys(ASKERS, 2)
    command = "import json; from benchmarks.quality.data_sources import opening_hours as hours; "
    command += "print(json.dumps(hours.build_splits({'train': 24})))"
    path = {"PYTHONPATH": str(Path(prepare.__file__).parents[1]), "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | path, capture_output=True, check=True
    ).stdout
    assert json.loads(output)["train"] == splits["train"]


MILL = Place(
    name="Ravton",
    kind="museum",
    blocks=(Block((0, 1, 2, 3), Span(9 * 60, 17 * 60)), Block((5,), Span(10 * 60, 13 * 60 + 30))),
    pause=Span(12 * 60, 12 * 60 + 45),
    last_entry=30,
    winter=False,
    holidays=True,
    prices=(8, 3),
    free_day=2,
    rules={"dogs": False, "cards": True},
)
GARDEN = Place(
    "Elwick", "garden", (Block(tuple(range(7)), Span(540, 1200)),), None, None, True, False, (4, 2), None, {}
)
ANSWERS = {
    "opening": {"monday": "At 9:00.", "saturday": "At 10:00.", "sunday": "It is closed on Sundays."},
    "duration": {"monday": "For 7 hours and 15 minutes.", "saturday": "For 3 hours and 30 minutes."},
    "last entry": {"monday": "Until 16:30.", "saturday": "Until 13:00."},
    "closed days": {"": "On Fridays and Sundays."},
    "holiday": {"": "It is closed then, as on Sundays."},
    "rule": {"dog": "No, that is not allowed.", "card": "Yes, that is allowed."},
    "earlier": {
        "saturday": "The Elwick garden, at 9:00.",
        "friday": "The Elwick garden; the Ravton museum is closed then.",
    },
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_follow_from_the_facts(kind):
    questions = [ASKERS[kind](Draw(str(seed)), MILL, GARDEN) for seed in range(100)]
    for words, answer in ANSWERS[kind].items():
        answers = {question.answer for question in questions if question and words in question.text.lower()}
        assert answers == {answer}


def read_time(text: str) -> int:
    hour, minute = re.search(r"at (\d+):(\d\d)\?", text).groups()
    return int(hour) * 60 + int(minute)


def test_a_visit_is_possible_exactly_between_the_times():
    seen = set()
    for seed in range(3000):
        question = ASKERS["time"](Draw(str(seed)), MILL, GARDEN)
        if question and "Monday" in question.text and "tomorrow" not in question.text:
            time = read_time(question.text)
            expected = (
                "No, it opens at 9:00." if time < 540
                else "Yes, until 12:00." if time < 720
                else "No, it has a break until 12:45." if time < 765
                else "Yes, until 17:00." if time < 1020
                else "No, it closes at 17:00."
            )  # fmt: skip
            assert question.answer == expected
            seen.add(expected)
        if question and question.text.startswith("It is Saturday"):
            assert question.answer == "No, it is closed on Sundays."
            seen.add("tomorrow")
    assert len(seen) == 6


def test_a_group_pays_the_sum_of_its_tickets():
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for seed in range(200):
        question = ASKERS["total"](Draw(str(seed)), MILL, GARDEN)
        adults, children = re.search(r"(\w+) adults? and (\w+) child", question.text).groups()
        total = f"{8 * numbers[adults] + 3 * numbers[children]} euros."
        assert question.answer == ("Nothing, entry is free on Wednesdays." if "Wednesday" in question.text else total)


def test_winter_days_end_an_hour_earlier():
    questions = [ASKERS["closing"](Draw(str(seed)), GARDEN, MILL) for seed in range(60)]
    assert {question.answer.split()[1] for question in questions if "January" in question.text} == {"19:00."}
    assert {question.answer.split()[1] for question in questions if "July" in question.text} == {"20:00."}
    # Without a month these have no answer.
    assert all(ASKERS[kind](Draw("x"), GARDEN, GARDEN) is None for kind in ("time", "duration", "later", "both"))


def test_the_paragraph_tells_what_is_asked():
    for seed in range(40):
        text = " ".join(describe_place(Draw(str(seed)), MILL, "Marby", frozenset({"prices", "rules"})))
        assert "Ravton museum" in text and "{" not in text and "%" not in text
        assert "holidays" in text and "30 minutes" in text and re.search(r"\b8\b", text) and re.search(r"\b3\b", text)
        times = [time for block in MILL.blocks for time in block.hours] + list(MILL.pause)
        assert any(all(style(time) in text for time in times) for style in TIME_STYLES)
        assert all(day in text for day in ("Monday", "Wednesday", "Thursday", "Saturday"))


@pytest.mark.parametrize(
    ("time", "spellings"),
    [
        (570, ["9:30", "9.30", "9:30 am", "half past nine in the morning"]),
        (720, ["12:00", "12.00", "12 pm", "noon"]),
        (1005, ["16:45", "16.45", "4:45 pm", "a quarter to five in the afternoon"]),
        (1080, ["18:00", "18.00", "6 pm", "six in the evening"]),
    ],
)
def test_times_are_written_in_four_ways(time, spellings):
    assert [style(time) for style in TIME_STYLES] == spellings


def test_a_source_in_two_splits_is_refused():
    row, same = {"source": "A mill."}, {"source": "a  mill"}
    with pytest.raises(ValueError, match="a row of 'dev' is also in 'train': 'a  mill'"):
        check_splits("mills", {"train": [row], "dev": [same]})
    with pytest.raises(ValueError, match="the split 'dev' has no rows"):
        check_splits("mills", {"train": [row], "dev": []})
    with pytest.raises(ValueError, match="mills: 1 rows are left after filtering, 3 are needed"):
        cut_splits("mills", [row], {"train": 2, "dev": 1})


def test_files_are_json_lines_and_a_finished_data_set_is_left_alone(tmp_path, monkeypatch):
    rows = [{"source": "Où ?\nIci", "references": ["là"]}]
    write_splits(tmp_path / "mills", {"train": rows, "dev": rows})
    assert not is_complete(tmp_path / "mills")
    write_splits(tmp_path / "mills", {"test": rows})
    assert is_complete(tmp_path / "mills")
    line = (tmp_path / "mills" / "train.jsonl").read_text(encoding="utf-8")
    assert line.endswith("}\n") and line.count("\n") == 1 and json.loads(line) == rows[0]
    monkeypatch.setitem(prepare.BUILDERS, "mills", lambda path: pytest.fail("prepared again"))
    assert prepare.prepare_data_set("mills", tmp_path, tmp_path / "downloads") == "mills: is there already"


def test_the_command_writes_the_published_opening_hours_and_refuses_changed_ones(tmp_path, monkeypatch, capsys):
    command = ["prepare.py", "--output", str(tmp_path), "--only", "opening_hours"]
    monkeypatch.setattr(sys, "argv", command)
    prepare.main()
    assert capsys.readouterr().out == "opening_hours: 1000 train, 150 dev, 300 test\n"
    prepare.main()
    assert capsys.readouterr().out == "opening_hours: is there already\n"
    path = tmp_path / "opening_hours" / "dev.jsonl"
    path.write_text(path.read_text().replace("Monday", "Tuesday"))
    with pytest.raises(SystemExit, match=r"opening_hours cannot be prepared: .*dev.jsonl has the SHA-256"):
        prepare.main()


def test_every_file_has_a_published_checksum():
    names = {line.split()[1] for line in prepare.CHECKSUMS.read_text().splitlines()}
    splits = ("train", "dev", "test")
    assert names == {f"{name}/{split}.jsonl" for name, split in itertools.product(prepare.BUILDERS, splits)}


def test_shingles_are_runs_of_words():
    assert build_shingles("A b, c d", 3) == {"a b c", "b c d"}
    assert build_shingles("a", 3) == {"a"}
