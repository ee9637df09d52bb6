"""`check_data` counts a whole data set and goes on after every fault."""

import numpy as np

from tests.data.samples import RecordingRecorder, make_devkit, make_folder, save_bomb, save_photo
from wsss_core.config import DataConfig
from wsss_core.data.check import check_data
from wsss_core.data.images import write_mask


def check(root, **settings):
    return check_data(DataConfig(**settings), root, RecordingRecorder())


def test_check_data__counts(tmp_path):
    tags = {"p1": "cat dog", "p2": "cat dog", "p3": "cat", "p4": "dog sofa cat", "p5": "dog"}
    make_devkit(tmp_path, tags, train=["p1", "p2", "p3", "p4"], val=["p5"])
    recorder = RecordingRecorder()
    report = check_data(DataConfig(), tmp_path, recorder)
    assert report.source == "voc"
    assert report.faults == ()
    assert report.num_photos == {"train": 4, "val": 1}
    assert report.num_masks == {"train": 4, "val": 1}
    assert report.tagged == {"train": {"cat": 4, "dog": 3, "sofa": 1}, "val": {"dog": 1}}
    assert report.company == {("cat", "dog"): 3, ("cat", "sofa"): 1, ("dog", "sofa"): 1}
    assert report.alone == {"cat": 1}
    assert recorder.passes[-1] == ("checking photos", 5, 5)
    lines = report.lines()
    assert [line.split() for line in lines[1:4]] == [
        ["train", "val", "alone"],
        ["photos", "4", "1"],
        ["masks", "4", "1"],
    ]
    assert lines[5].split() == ["2", "dog", "3", "1", "0"]
    assert "company in train: cat+dog 3, cat+sofa 1, dog+sofa 1" in lines
    assert lines[-1] == "faults: 0, warnings: 3"


def test_check_data__classes_that_tags_cannot_tell_apart(tmp_path):
    rows = {
        "a.jpg": "cat sofa",
        "b.jpg": "cat",
        "c.jpg": "dog rug",
        "d.jpg": "dog",
        "e.jpg": "horse rug",
        "f.jpg": "horse",
    }
    labels = ["background", "cat", "dog", "emu", "horse", "rug", "sofa"]
    report = check(make_folder(tmp_path, rows, labels=labels))
    assert report.faults == ()
    assert report.warnings == (
        "class 'emu' is in no training photo; it cannot be learned",
        "class 'rug' is never alone (2 training photos, 1 with 'dog'); tags can hardly tell it "
        "from its company",
        "class 'sofa' is never without 'cat' (1 training photos); tags cannot tell them apart",
    )


def test_check_data__other_warnings(tmp_path):
    rows = {"a.jpg": "cat", "b.jpg": "Cat", "sub/c.jpg": "cat"}
    root = make_folder(tmp_path, rows, lists={"train": ["a", "b"], "val": ["b", "sub/c"]})
    save_photo(root / "new.jpg")
    save_photo(root / ".conta" / "panel.png")
    write_mask(root / "masks" / "b.png", np.zeros((7, 10), np.uint8))
    write_mask(root / "masks" / "c.png", np.zeros((8, 10), np.uint8))  # its photo is in sub/
    (root / "masks" / "README.txt").write_text("mine")
    (root / "masks" / "._b.png").write_bytes(b"of a Mac")
    report = check(root)
    assert report.faults == ()
    assert report.warnings == (
        "classes 'Cat' and 'cat' differ in case alone; are they one class?",
        "1 photos of 'val' are also trained on (first: 'b'); its scores are not those of unseen "
        "photos",
        "1 of the 2 photos of 'train' have no mask; scores leave them out",
        "1 of the 2 photos of 'val' have no mask; scores leave them out",
        "1 masks belong to no photo; a mask has its photo's name and subfolder, and ends in .png: "
        "masks/c.png",
        f"1 photos have no row in {root / 'tags.csv'} and are not used: new.jpg",
    )


def test_check_data__a_class_that_is_everywhere(tmp_path):
    rows = {"a.jpg": "dog", "b.jpg": "cat dog", "c.jpg": "dog"}
    warnings = check(make_folder(tmp_path, rows)).warnings
    assert [text for text in warnings if text.startswith("class 'dog'")] == [
        "class 'dog' is in every training photo; nothing tells it from the background, add photos "
        "without it"
    ]
    assert [text for text in warnings if "'cat' is never without 'dog'" in text]


def test_check_data__without_a_tag_table_no_file_is_called_astray(tmp_path):
    root = make_folder(tmp_path, {"a.jpg": "cat"})
    write_mask(root / "masks" / "a.png", np.zeros((8, 10), np.uint8))
    (root / "tags.csv").unlink()
    report = check(root)
    assert [text for text in report.faults if "tags.csv" in text]
    assert report.warnings == ()


def test_check_data__names_every_fault(tmp_path):
    names = ("good", "cut", "text", "bomb", "untagged", "unknown", "turned", "stray", "rgb")
    rows = {f"{name}.jpg": "cat dog" for name in names}
    root = make_folder(tmp_path, rows, labels=["background", "cat", "dog"])
    rows |= {
        "untagged.jpg": "",
        "unknown.jpg": "dgo",
        "gone.jpg": "cat",
        "../up.jpg": "cat",
        "/etc/root.jpg": "cat",
        "bad.jpg": "cat,dog",
        "turned.png": "dog",
    }
    table = "".join(f"{name},{tags}\n" for name, tags in rows.items())
    (root / "tags.csv").write_text("filename,tags\n" + table + "good.jpg,dog\n")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_photo(root / "cut.jpg", noise)
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:-700])
    (root / "text.jpg").write_text("hello")
    save_bomb(root / "bomb.jpg", 60_000)
    save_photo(root / "turned.jpg", orientation=6)
    write_mask(root / "masks" / "turned.png", np.zeros((6, 10), np.uint8))
    write_mask(root / "masks" / "stray.png", np.full((13, 10), 3, np.uint8))
    save_photo(root / "masks" / "rgb.png")
    report = check(root)
    says = [
        "line 14: has 3 cells",
        "'../up.jpg' leaves the data folder",
        "'/etc/root.jpg' is an absolute path",
        "'turned.png' and 'turned.jpg' of line 8 would share the id",
        "'good.jpg' was already on line 2",
        "line 6: 'untagged.jpg' has no tag",
        "line 7: unknown class 'dgo' (did you mean 'dog'?)",
        "no photo 'gone.jpg'",
        "cut.jpg is cut off",
        "text.jpg is not a picture",
        "bomb.jpg has more than",
        "turned.png is 10 x 6 px, its photo 6 x 10 px",
        "stray.png holds label 3",
        "rgb.png holds RGB pixels",
    ]
    for text in says:
        assert sum(text in fault for fault in report.faults) == 1, text
    assert len(report.faults) == len(says)
    assert report.num_photos == {"train": 9}
    assert report.lines()[-1] == f"faults: {len(says)}, warnings: {len(report.warnings)}"
    assert all("\n" not in line for line in report.lines())


def test_check_data__devkit_with_a_broken_csv(tmp_path):
    make_devkit(tmp_path, {"p1": "cat", "p2": "dog"}, train=["p1", "p9"], val=["p2"])
    (tmp_path / "image_tags.csv").write_text("file,tags\np1.jpg,cat\n")
    (tmp_path / "JPEGImages" / "p2.jpg").write_text("no photo")
    faults = check(tmp_path).faults
    assert len(faults) == 3
    assert "train.txt line 2: no photo 'p9'" in faults[0]
    assert "image_tags.csv line 1: holds the columns 'file,tags'" in faults[1]
    assert "p2.jpg is not a picture" in faults[2]


def test_check_data__nothing_there(tmp_path):
    assert "is not a folder" in check(tmp_path / "gone").faults[0]
    assert "tags.csv does not exist" in check(tmp_path).faults[0]
    assert check(tmp_path).lines()[-1] == "faults: 2, warnings: 0"


def test_check_data__download_that_fails(tmp_path, monkeypatch):
    def fail(root, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fail)
    report = check(tmp_path, source="voc", download=True)
    assert "could not be downloaded" in report.faults[0]
