"""Tables as users have them: each test plants one fault, or one value that a careless reader would change."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import tiny
from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data import audit
from vlmtune.data.audit import audit_frame
from vlmtune.data.bad_rows import BadRowsError, write_quarantine
from vlmtune.data.records import BadRow, Record, Turn
from vlmtune.data.splits import Split
from vlmtune.data.table import load, read_files
from vlmtune.errors import ConfigError, DataError

HEADER = "image_path,question,answer\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images, 0.png to 9.png, in the folder of the tables."""
    for i in range(10):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def table(folder: Path, text: str | bytes, name: str = "train.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows(text: str, folder: Path, **data: Any) -> Split:
    return load(DataConfig(train=table(folder, HEADER + text), **data), TaskConfig(), 0)["train"]


def refusal(text: str | bytes, folder: Path, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(DataConfig(train=table(folder, text), **data), TaskConfig(), 0)
    return str(caught.value)


def bad(text: str, folder: Path) -> list[BadRow]:
    with pytest.raises(BadRowsError) as caught:
        rows(text, folder)
    return caught.value.bad


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("answer", ["NA", "None", "null", "nan", "007", "1.0", "1e3", "True", " yes", "[12, 40]", "[]"])
def test_answers_stay_as_written(answer: str, folder: Path) -> None:
    """A reader that guesses types trains on `nan` and `7.0`."""
    split = rows(f'0.png,what?,"{answer}"\n', folder)
    assert split.records[0].answers == (answer,)
    assert split.frame is not None
    assert split.frame["answer"].tolist() == [answer]


def test_a_record_is_its_row(folder: Path) -> None:
    split = rows("0.png,what?,red\n1.png,where?,left\n", folder)
    image = folder.resolve() / "1.png"
    assert split.records[1] == Record(
        (Turn("where?", ("left",)),), (image,), str(image), file=str(folder / "train.csv"), row=1
    )


def test_a_json_list_holds_several_references(folder: Path) -> None:
    cell = json.dumps(["red", "dark, red"]).replace('"', '""')
    assert rows(f'0.png,what?,"{cell}"\n', folder).records[0].answers == ("red", "dark, red")


def test_a_blank_reference_is_a_bad_row(folder: Path) -> None:
    """The first reference is trained on: a blank one would teach silence."""
    assert "one in the list is blank" in bad('0.png,what?,"["""", ""red""]"\n', folder)[0].reason


def test_a_python_list_is_not_trained_on_as_text(folder: Path) -> None:
    """What pandas writes for a column of lists; it would be learnt with brackets and quotes."""
    assert 'write JSON: ["one", "two"]' in bad("0.png,what?,\"['red', 'blue']\"\n", folder)[0].reason


def test_unicode_commas_quotes_and_line_breaks_survive(folder: Path) -> None:
    split = rows('0.png,"Où, ""là""?\nici?","早,い"\n', folder)
    assert (split.records[0].question, split.records[0].answers) == ('Où, "là"?\nici?', ("早,い",))


def test_a_byte_order_mark_is_no_part_of_the_first_column(folder: Path) -> None:
    path = table(folder, b"\xef\xbb\xbf" + (HEADER + "0.png,what?,red\n").encode())
    assert len(load(DataConfig(train=path), TaskConfig(), 0)["train"]) == 1


def test_a_row_without_question_is_a_caption(folder: Path) -> None:
    task = TaskConfig(caption_prompt="Say what you see.")
    with_column = DataConfig(train=table(folder, HEADER + "0.png, ,a cat\n", "a.csv"))
    captions = ColumnsConfig(question=None)
    without_column = DataConfig(train=table(folder, "image_path,answer\n0.png,a cat\n", "b.csv"), columns=captions)
    for config in (with_column, without_column):
        assert load(config, task, 0)["train"].records[0].question == "Say what you see."


def test_a_row_without_image_is_text_alone_and_shares_no_group(folder: Path) -> None:
    records = rows(",who?,me\n,what?,that\n", folder).records
    assert [(record.images, record.group) for record in records] == [((), None), ((), None)]


def test_a_row_without_image_and_question_is_bad(folder: Path) -> None:
    assert "neither image nor question" in bad(",,that\n", folder)[0].reason


# ---------------------------------------------------------------- paths


def test_relative_paths_start_at_the_table_or_at_image_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tables").mkdir()
    monkeypatch.chdir(folder / "tables")
    path = table(folder, HEADER + "0.png,what?,red\n", "tables/train.csv")
    with pytest.raises(DataError, match=f"no such image: {folder}/tables/0.png"):
        load(DataConfig(train=path), TaskConfig(), 0)
    assert len(load(DataConfig(train=path, image_root=str(folder)), TaskConfig(), 0)["train"]) == 1


def test_tilde_is_the_home_folder_and_absolute_paths_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    table(folder, HEADER + f"~/0.png,what?,red\n{folder}/1.png,what?,red\n")
    split = load(DataConfig(train="~/train.csv", image_root="/nowhere"), TaskConfig(), 0)["train"]
    assert [record.images[0] for record in split.records] == [folder.resolve() / "0.png", folder.resolve() / "1.png"]


def test_two_spellings_of_a_path_are_one_group(folder: Path) -> None:
    records = rows(f"0.png,a?,1\n./0.png,b?,2\n{folder}/0.png,c?,3\n1.png,d?,4\n", folder).records
    assert [record.group == records[0].group for record in records] == [True, True, True, False]


@pytest.mark.parametrize("url", ["https://x.org/a.png", "s3://bucket/a.png", "data:image/png;base64"])
def test_a_url_is_refused_with_what_to_do(url: str, folder: Path) -> None:
    assert "download it first" in bad(f"{url},what?,red\n", folder)[0].reason


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            HEADER.encode() + b"0.png,what?,red\n0.png,caf\xe9?,red\n",
            "line 3, row 2: undecodable: byte 0xe9 is not UTF-8",
        ),
        ((HEADER + "0.png,what?,red\n").encode("utf-16"), "is text in UTF-16"),
        (b"", "is empty"),
        (HEADER.encode(), "has a header and no rows"),
        (b"answer,image_path,answer\nred,0.png,blue\n", "2 columns are named 'answer'"),
        (b"image_path\tquestion\tanswer\n0.png\twhat, now?\tred\n", r"separated by '\t'"),
        (b"image_path;question;answer\n0.png;what?;red\n", "separated by ';'"),
        (HEADER.encode() + b'0.png,what?,red\n0.png,"so,red\n1.png,b,c\n', "line 3, row 2: unclosed quote"),
        (HEADER.encode() + b'0.png,"a"b,red\n', "line 2, row 1: stray quote: ',' expected after '\"'"),
    ],
)
def test_a_file_that_is_no_utf8_csv_names_file_and_line(content: bytes, expected: str, folder: Path) -> None:
    message = refusal(content, folder)
    assert expected in message
    assert f"{folder}/train.csv" in message


def test_ragged_rows_name_their_lines_after_quoted_line_breaks(folder: Path) -> None:
    """Line numbers must be the editor's, not the count of records."""
    message = refusal(HEADER + '0.png,"two\nlines?",red\n\n0.png,one, two?,red\n0.png,what?\n', folder)
    assert (
        "line 5, row 2: too many fields: 4 where the header has 3; put a field that holds commas in quotes" in message
    )
    assert "line 6, row 3: too few fields: 2 where" in message


def test_a_missing_table_names_the_nearest_file(folder: Path) -> None:
    table(folder, HEADER, "vqa_train.csv")
    with pytest.raises(DataError, match=r"did you mean vqa_train\.csv"):
        read_files(DataConfig(train=str(folder / "vqa_trian.csv")))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Image,question,answer", "data.columns.image=Image"),
        ("image_path,question,Answer", "data.columns.answer=Answer"),
        ("image_path,question,the answer", "\"data.columns.answer='the answer'\""),
        ("image_path,Question,answer", "data.columns.question=Question"),
        ("image_path,question,label", "try data.columns.answer=label"),
    ],
)
def test_a_missing_column_names_the_override_that_works(header: str, expected: str, folder: Path) -> None:
    """Of `Question`: a typo must not turn every row into a caption."""
    assert expected in refusal(f"{header}\n0.png,what?,red\n", folder)


def test_a_question_column_that_was_named_must_be_there(folder: Path) -> None:
    assert "no column 'query'" in refusal(
        "image_path,answer\n0.png,red\n", folder, columns=ColumnsConfig(question="query")
    )


def test_all_problems_of_all_files_come_in_one_error(folder: Path) -> None:
    config = DataConfig(
        train=table(folder, "image_path,question,Answer\n0.png,what?,red\n"),
        validation=table(folder, b"\xff", "validation.csv"),
        test=str(folder / "missing.csv"),
    )
    with pytest.raises(DataError) as caught:
        load(config, TaskConfig(), 0)
    assert len(caught.value.problems) == 3


# ---------------------------------------------------------------- bad rows

FAULTY = '0.png,"a\nb?",red\n0.png,what?,\nnone.png,what?,red\n1.png,what?,red\nnone.gif,why?,\n,,\n'


def test_each_bad_row_has_its_line_row_and_every_reason(folder: Path) -> None:
    found = bad(FAULTY, folder)
    assert [(row.line, row.row) for row in found] == [(4, 2), (5, 3), (7, 5), (8, 6)]
    assert [row.reason.split(":")[0] for row in found[:3]] == [
        "empty answer",
        "no such image",
        "empty answer; no such image",
    ]
    assert "nothing to answer" in found[3].reason
    assert "empty answer" in found[3].reason


def test_the_message_lists_the_first_bad_rows_counts_kinds_and_names_the_policy(folder: Path) -> None:
    message = refusal(HEADER + "0.png,what?,red\n" + "gone.png,what?,red\n" * 30 + "0.png,who?,\n", folder)
    assert "31 of 32 rows can't be used (30 x no such image, 1 x empty answer)" in message
    assert "line 3, row 2 and 29 more: no such image" in message, "thirty rows of one missing image are one fault"
    assert "data.on_bad_row=drop" in message
    assert "data.image_root" in message


def test_the_first_twenty_faults_are_shown_and_the_rest_counted(folder: Path) -> None:
    message = refusal(HEADER + "".join(f"gone{i}.png,what?,red\n" for i in range(31)), folder)
    assert message.count("\n  line ") == 20
    assert "and 11 more rows" in message


def test_bad_rows_of_two_splits_come_in_one_error(folder: Path) -> None:
    files = {name: table(folder, HEADER + "0.png,what?,\n", f"{name}.csv") for name in ("train", "validation")}
    with pytest.raises(BadRowsError) as caught:
        load(DataConfig(**files), TaskConfig(), 0)  # type: ignore[arg-type]
    assert [row.file for row in caught.value.bad] == list(files.values())


def test_drop_keeps_the_rest_with_positions_in_the_frame(folder: Path) -> None:
    """predictions.csv joins records to the frame by position: dropping must not shift it."""
    split = rows(FAULTY, folder, on_bad_row="drop", max_bad_fraction=0.7)
    assert [record.row for record in split.records] == [0, 3]
    assert len(split.bad) == 4
    assert split.frame is not None
    assert len(split.frame) == 6


def test_drop_stops_above_the_allowed_share_and_when_nothing_is_left(folder: Path) -> None:
    assert "above data.max_bad_fraction=0.5" in refusal(
        HEADER + FAULTY, folder, on_bad_row="drop", max_bad_fraction=0.5
    )
    assert "no row is left" in refusal(HEADER + "0.png,a?,\n", folder, on_bad_row="drop", max_bad_fraction=1.0)


def test_the_same_question_with_another_answer_or_in_another_split_is_no_duplicate(folder: Path) -> None:
    text = HEADER + "0.png,what?,red\n0.png,what?,blue\n1.png,what?,red\n"
    config = DataConfig(train=table(folder, text), validation=table(folder, text, "validation.csv"))
    assert [len(split) for split in load(config, TaskConfig(), 0).values()] == [3, 3]


def test_each_image_is_opened_once_however_many_rows_ask_about_it(folder: Path, monkeypatch: Any) -> None:
    opened = []
    monkeypatch.setattr(audit, "open_image", lambda source, most: opened.append(source))
    rows("".join(f"{i % 2}.png,question {i}?,red\n" for i in range(20)), folder)
    assert len(opened) == 2


def test_check_images_header_lets_damage_pass_and_decode_does_not(folder: Path) -> None:
    (folder / "cut.bmp").write_bytes(b"")
    Image.effect_noise((50, 50), 50).save(folder / "cut.bmp")
    (folder / "cut.bmp").write_bytes((folder / "cut.bmp").read_bytes()[:-500])
    assert len(rows("cut.bmp,what?,red\n", folder, check_images="header")) == 1
    assert "damaged image" in bad("cut.bmp,what?,red\n", folder)[0].reason


def test_quarantine_is_a_csv_that_reads_back(folder: Path) -> None:
    write_quarantine(folder / "q.csv", [BadRow("a.csv", 3, 2, 'no, "such"\nimage'), BadRow("", 0, 1, "empty answer")])
    with open(folder / "q.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["file", "line", "row", "reason"],
            ["a.csv", "3", "2", 'no, "such"\nimage'],
            ["", "", "1", "empty answer"],
        ]


# ---------------------------------------------------------------- frames in memory


def test_a_frame_for_prediction_keeps_bad_rows_apart_and_needs_no_answers(folder: Path) -> None:
    image = Image.new("RGB", (4, 4))
    content = (folder / "0.png").read_bytes()
    cells = [image, content, folder / "0.png", str(folder / "0.png"), 7, float("nan"), "gone.png", image, b"no image"]
    frame = pd.DataFrame({"image_path": cells, "question": ["what?"] * len(cells)}, index=list("abcdefghi"))
    split = audit_frame(frame, DataConfig(), TaskConfig(), answers_required=False)
    assert [record.row for record in split.records] == [0, 1, 2, 3, 5, 7]
    assert [(row.row, row.line) for row in split.bad] == [(5, 0), (7, 0), (9, 0)]
    groups = [record.group for record in split.records]
    assert groups[0] == groups[5]
    assert groups[2] == groups[3]
    assert len({*groups}) == 4
    assert split.records[0].answers == ()


def test_a_frame_may_hold_lists_numbers_and_missing_values(folder: Path) -> None:
    answers = [["red", "dark red"], 7, None, float("nan"), pd.NA]
    frame = pd.DataFrame({"image_path": [str(folder / "0.png")] * 5, "question": list("abcde"), "answer": answers})
    split = audit_frame(frame, DataConfig(), TaskConfig())
    assert [record.answers for record in split.records] == [("red", "dark red"), ("7",)]
    assert [row.reason for row in split.bad] == ["empty answer"] * 3


# ---------------------------------------------------------------- splits


def many(folder: Path, **data: Any) -> DataConfig:
    text = "".join(f"{i % 10}.png,question {i}?,red\n" for i in range(60))
    return DataConfig(train=table(folder, HEADER + text), **data)


def test_held_out_images_are_whole_disjoint_and_the_same_for_a_seed(folder: Path) -> None:
    """A question of a training image in validation measures memory."""
    config = many(folder, validation_fraction=0.3)
    first, again, other = (load(config, TaskConfig(), seed) for seed in (0, 0, 1))
    groups = {name: {record.group for record in split.records} for name, split in first.items()}
    assert (len(groups["train"]), len(groups["validation"])) == (7, 3)
    assert not groups["train"] & groups["validation"]
    assert len(first["train"]) + len(first["validation"]) == 60
    assert first["validation"].records[:] == again["validation"].records[:] != other["validation"].records[:]


def test_held_out_rows_do_not_train_when_only_train_is_asked_for(folder: Path) -> None:
    config = many(folder, validation_fraction=0.3)
    together = load(config, TaskConfig(), 0)
    assert load(config, TaskConfig(), 0, ("train",))["train"].records[:] == together["train"].records[:]
    assert load(config, TaskConfig(), 0, ("validation",))["validation"].records[:] == together["validation"].records[:]


def test_a_given_validation_file_holds_nothing_out(folder: Path) -> None:
    validation = table(folder, HEADER + "0.png,what?,red\n", "validation.csv")
    found = load(many(folder, validation=validation, validation_fraction=0.3), TaskConfig(), 0)
    assert (len(found["train"]), len(found["validation"])) == (60, 1)


def test_one_image_cannot_be_held_out(folder: Path) -> None:
    text = HEADER + "0.png,a?,red\n0.png,b?,red\n"
    assert "all rows show one image" in refusal(text, folder, validation_fraction=0.5)


def test_limits_draw_training_rows_in_order_and_take_the_first_of_validation(folder: Path) -> None:
    validation = table(folder, HEADER + "".join(f"0.png,q{i}?,red\n" for i in range(9)), "validation.csv")
    config = many(folder, validation=validation, max_train_rows=20, max_eval_rows=3)
    found, other = load(config, TaskConfig(), 0), load(config, TaskConfig(), 1)
    drawn = [record.row for record in found["train"].records]
    assert len(drawn) == 20
    assert drawn == sorted(drawn) != list(range(20))
    assert drawn != [record.row for record in other["train"].records]
    assert [record.row for record in found["validation"].records] == [0, 1, 2]


def test_only_the_wanted_splits_are_read(folder: Path) -> None:
    """Prediction on another machine must not need the training file that the run's config names."""
    config = DataConfig(train="/gone/train.csv", test=table(folder, "image_path,question\n0.png,what?\n0.png,what?\n"))
    found = load(config, TaskConfig(), 0, ("test",), answers_required=False)
    assert list(found) == ["test"]
    assert len(found["test"]) == 2


def test_no_training_file_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.train: .*data\.train=FILE"):
        load(DataConfig(), TaskConfig(), 0)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("load", "must be a dotted path"),
        ("no_such_module.load", "can't import no_such_module.*PYTHONPATH"),
        ("vlmtune.data.table.read_file", "did you mean read_files"),
        ("vlmtune.data.table.SPLITS", "is tuple"),
        ("my_source.wrong_split", "'valid'; did you mean validation"),
        ("my_source.wrong_rows", "train is int"),
        ("my_source.no_mapping", "returned list"),
    ],
)
def test_a_target_that_does_not_work_says_which_step_fails(target: str, expected: str, folder: Path) -> None:
    source(folder)
    with pytest.raises(ConfigError, match=expected):
        load(DataConfig(_target_=target), TaskConfig(), 0)


def source(folder: Path) -> None:
    """Write a module `my_source` as a user would."""
    (folder / "my_source.py").write_text(
        "import pandas as pd\n"
        "from vlmtune.data.records import Record, Turn\n"
        "def records(config): return {'train': [Record((Turn('q', ('a',)),))] * 3}\n"
        f"def frames(config): return {{'train': pd.DataFrame({{'image_path': [r'{folder}/0.png', 'gone.png'], "
        "'question': ['q', 'q'], 'answer': ['a', 'a']})}\n"
        "def wrong_split(config): return {'valid': []}\n"
        "def wrong_rows(config): return {'train': 3}\n"
        "def no_mapping(config): return []\n"
    )


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_source", raising=False)


def test_records_of_a_users_function_are_taken_as_they_are(folder: Path) -> None:
    source(folder)
    assert len(load(DataConfig(_target_="my_source.records"), TaskConfig(), 0)["train"]) == 3


def test_frames_of_a_users_function_are_audited(folder: Path) -> None:
    source(folder)
    with pytest.raises(BadRowsError, match="train: 1 of 2 rows"):
        load(DataConfig(_target_="my_source.frames"), TaskConfig(), 0)


@pytest.mark.slow  # 48,248 rows
def test_easy_vqa_passes_the_audit_and_keeps_the_packages_own_splits() -> None:
    pytest.importorskip("easy_vqa")
    found = load(DataConfig(_target_="vlmtune.data.sources.easy_vqa.load", check_images="header"), TaskConfig(), 0)
    assert {name: len(split) for name, split in found.items()} == {"train": 38_575, "validation": 9_673}
    images = {name: {record.group for record in split.records} for name, split in found.items()}
    assert (len(images["train"]), len(images["validation"])) == (4_000, 1_000)
    assert images["train"].isdisjoint(images["validation"])


def test_easy_vqa_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match="pip install easy-vqa"):
        load(DataConfig(_target_="vlmtune.data.sources.easy_vqa.load"), TaskConfig(), 0)


def test_a_lazy_sequence_of_records_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of a million generated scenes must not be drawn when it is loaded."""

    class Scenes(Sequence[Record]):
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("drawn too early")

    module: Any = type(sys)("my_source")
    module.scenes = lambda config: {"train": Scenes()}
    monkeypatch.setitem(sys.modules, "my_source", module)
    assert len(load(DataConfig(_target_="my_source.scenes"), TaskConfig(), 0)["train"]) == 1_000_000


def test_importing_the_table_is_quick() -> None:
    """A typo on the command line is answered in a second: neither torch nor pandas may load before they are needed."""
    code = "import sys, vlmtune.data.table; sys.exit(bool({'torch', 'pandas', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_copies_of_an_image_are_one_group(tmp_path: Path) -> None:
    """Rows of one image are found by content, so that they share its tokens and stay on one side of a split."""
    for name, seed in (("a.png", 1), ("copy.png", 1), ("other.png", 2)):
        tiny.image(seed=seed).save(tmp_path / name)
    names = ["a.png", "copy.png", "other.png", '["a.png", "other.png"]', '["copy.png", "other.png"]', ""]
    table = pd.DataFrame({"image_path": names, "question": "What?", "answer": "red"})
    split = audit_frame(table, DataConfig(image_root=str(tmp_path)), TaskConfig())
    groups = [record.group for record in split.records]
    assert groups[0] == groups[1] != groups[2]
    assert groups[3] == groups[4] == (groups[0], groups[2])
    assert groups[5] is None
    assert [Path(str(record.images[0])).name for record in split.records[:2]] == ["a.png", "copy.png"]


def no_tables(config: DataConfig) -> dict[str, pd.DataFrame]:
    return {}


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (read_files, ""),
        (no_tables, f", or let data._target_={__name__}.no_tables return the split 'train'"),
    ],
)
def test_a_missing_split_names_what_helps(source: Any, advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(DataConfig(_target_=f"{source.__module__}.{source.__name__}"), TaskConfig(), 0, ("train",))
    assert str(refused.value) == f"data.train: missing; set data.train=FILE{advice}"
