"""Splits of CLAM, soma and HIPT are read as patients, and a patient in two parts is an error."""

from __future__ import annotations

import pytest

from maskattn.evaluation import LeakError, Split
from maskattn.evaluation.split_files import read_splits, write_splits

# Patient p1 has the slides p1-0 and p1-1, and so on; a patient's own id serves too.
PATIENT_OF = {f"p{patient}-{slide}": f"p{patient}" for patient in range(1, 7) for slide in (0, 1)}
PATIENT_OF |= {f"p{patient}": f"p{patient}" for patient in range(1, 7)}
EXPECTED = [
    Split(("p1", "p2", "p3"), ("p4",), ("p5", "p6")),
    Split(("p4", "p5", "p6"), ("p3",), ("p1", "p2")),
]


def parts_of(split):
    return {"train": split.train, "val": split.validation, "test": split.test}


def slides(patients):
    return [f"{patient}-{slide}" for patient in patients for slide in (0, 1)]


def clam_wide(folder):
    """As CLAM's save_splits and pandas write it: columns of unlike length, filled up, and an index without a name."""
    for fold, split in enumerate(EXPECTED):
        columns = {name: slides(part) for name, part in parts_of(split).items()}
        lines = [",train,val,test"]
        for row in range(max(map(len, columns.values()))):
            lines.append(",".join([str(row), *(part[row] if row < len(part) else "" for part in columns.values())]))
        (folder / f"splits_{fold}.csv").write_text("\n".join(lines) + "\n")


def clam_bool(folder):
    for fold, split in enumerate(EXPECTED):
        lines = [",train,val,test"]
        for index, part in enumerate(parts_of(split).values()):
            lines += [",".join([slide, *(str(index == one) for one in range(3))]) for slide in slides(part)]
        (folder / f"splits_{fold}_bool.csv").write_text("\n".join(lines) + "\n")


def soma(folder):
    lines = ["fold,sample_id,split"]
    for fold, split in enumerate(EXPECTED):
        for name, part in parts_of(split).items():
            lines += [f"{fold},{slide},{'tune' if name == 'val' else name}" for slide in slides(part)]
    (folder / "splits.csv").write_text("\n".join(lines) + "\n")


def hipt(folder):
    for fold, split in enumerate(EXPECTED):
        (folder / f"fold_{fold}").mkdir()
        for name, part in parts_of(split).items():
            text = "case_id,label\n" + "".join(f"{patient},1\n" for patient in part)
            (folder / f"fold_{fold}" / f"{'tune' if name == 'val' else name}.csv").write_text(text)


def ours(folder):
    write_splits(EXPECTED, folder / "splits.csv")


@pytest.mark.parametrize("write", [clam_wide, clam_bool, soma, hipt, ours], ids=lambda one: one.__name__)
def test_every_layout_gives_the_same_splits_of_patients(tmp_path, write):
    write(tmp_path)
    assert read_splits(tmp_path, PATIENT_OF) == EXPECTED


def test_one_file_is_one_fold_and_the_wide_table_comes_first(tmp_path):
    clam_wide(tmp_path)
    clam_bool(tmp_path)
    assert read_splits(tmp_path / "splits_1.csv", PATIENT_OF) == EXPECTED[1:]
    assert read_splits(tmp_path / "splits_0_bool.csv", PATIENT_OF) == EXPECTED[:1]
    assert read_splits(tmp_path, PATIENT_OF) == EXPECTED


def test_folds_are_in_the_order_of_their_numbers(tmp_path):
    for fold in range(11):
        test = "p5" if fold == 10 else "p6"
        (tmp_path / f"splits_{fold}.csv").write_text(f",train,val,test\n0,p1,p2,{test}\n")
    assert [split.test for split in read_splits(tmp_path, PATIENT_OF)] == [("p6",)] * 10 + [("p5",)]


def test_two_slides_of_a_patient_in_two_parts_are_a_leak_that_names_patient_and_fold(tmp_path):
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,p1-0,p2-0,p1-1\n")
    with pytest.raises(LeakError, match=r"got p1 in two \(p1 in train and test\).*fold 0 of .*splits|fold 0 of"):
        read_splits(tmp_path, PATIENT_OF)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fold,sample_id,split\n0,p1,train\n0,p2,tune\n0,p9,test\n", r"got p9 \(1 in fold 0"),
        ("fold,sample_id,split\n0,p1,train\n0,p2,holdout\n", "must be train, tune .or val. or test, got 'holdout'"),
        ("fold,sample_id,split\n0,p1,train\n0,p2,tune\n0,p3,test\n0,p4,test_b\n", "one test part, got test, test_b"),
        ("fold,sample_id,split\n0,p1,train\n0,p3,test\n", "patients in its validation part, got none"),
        ("fold,name,split\n0,p1,train\n", "columns fold, sample_id, split, got fold, name, split"),
        ("a,b\n1,2\n", r"columns train, val, test .CLAM's. or fold, sample_id, split .soma's., got a, b"),
    ],
)
def test_what_is_no_split_is_told(tmp_path, text, told):
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_splits(tmp_path, PATIENT_OF)


def test_a_folder_without_splits_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"must have splits_0.csv, fold_0/train.csv or splits.csv, got none"):
        read_splits(tmp_path, PATIENT_OF)
