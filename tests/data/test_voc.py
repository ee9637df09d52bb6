"""The devkit layout, its lists, its csv and its XML."""

import pytest

from tests.data.samples import RecordingRecorder, make_devkit, save_photo
from wsss_core.config import DataConfig
from wsss_core.data.labels import VOC_CLASSES
from wsss_core.data.source import detect_source, read_source
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError

TAGS = {"p2": "dog", "p1": "cat dog", "p3": "sofa cat", "p4": "cat"}


def read(root, recorder=None, **settings):
    settings = {"source": "voc"} | settings
    return read_source(DataConfig(**settings), root, recorder or RecordingRecorder())


def tags_of(dataset):
    return {
        split: {photo.id: photo.tags for photo in photos}
        for split, photos in dataset.splits.items()
    }


@pytest.mark.parametrize("below", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_read_voc__csv(tmp_path, below):
    folder = make_devkit(tmp_path / below, TAGS, train=["p3", "p1"], val=["p4"])
    dataset = read(tmp_path)
    assert dataset.classes == ("cat", "dog", "sofa")
    assert tags_of(dataset) == {"train": {"p1": (0, 1), "p3": (0, 2)}, "val": {"p4": (0,)}}
    assert [photo.id for photo in dataset.splits["train"]] == ["p1", "p3"]
    assert dataset.splits["val"][0].path == folder / "JPEGImages" / "p4.jpg"
    assert detect_source(tmp_path) == "voc"


def test_detect_source__folder_without_devkit(tmp_path):
    assert detect_source(tmp_path) == "photos"
    assert detect_source(tmp_path / "gone") == "photos"


def test_read_voc__xml_where_there_is_no_csv(tmp_path):
    recorder = RecordingRecorder()
    make_devkit(tmp_path, TAGS, train=["p1", "p2"], val=["p3"], xml=True)
    assert tags_of(read(tmp_path, recorder)) == {
        "train": {"p1": (0, 1), "p2": (1,)},
        "val": {"p3": (0, 2)},
    }
    assert recorder.passes[-1] == ("reading annotations", 3, 3)


def test_read_voc__xml_when_asked_beside_a_csv(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"], xml=True)
    (tmp_path / "image_tags.csv").write_text("filename,tags\np1.jpg,sofa\np2.jpg,sofa\n")
    assert tags_of(read(tmp_path))["train"] == {"p1": (2,)}
    assert tags_of(read(tmp_path, tags="Annotations"))["train"] == {"p1": (0, 1)}


@pytest.mark.parametrize("xml", [True, False])
def test_read_voc__umlauts_in_two_characters(tmp_path, xml):
    two = "u\u0308"
    tags = {f"Gr{two}n": f"B{two}r cat", "v": "cat"}
    make_devkit(tmp_path, tags, train=[f"Gr{two}n"], val=["v"], labels=(f"B{two}r", "cat"), xml=xml)
    (photo,) = read(tmp_path).splits["train"]
    assert (photo.id, photo.tags) == ("Grün", (0, 1))
    assert TruthMasks.of(tmp_path).path(photo.id).is_file()


def test_read_voc__objects_off_the_label_list_do_not_count(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"], labels=("emu", "cat"), xml=True)
    dataset = read(tmp_path)
    assert tags_of(dataset) == {"train": {"p1": (1,)}, "val": {"p2": ()}}
    with pytest.raises(DataError, match=r"p2\.xml: training photo 'p2' has no tag of the label"):
        read(tmp_path, train="val", val=())


def test_read_voc__names_of_parts_and_sources_are_no_objects(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], labels=("cat", "head", "flickr"), xml=True)
    assert tags_of(read(tmp_path, val=())) == {"train": {"p1": (0,)}}


def test_read_voc__a_csv_that_is_named_must_exist(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"], xml=True)
    with pytest.raises(DataError, match=r"other\.csv does not exist"):
        read(tmp_path, tags="other.csv")


def test_read_voc__twenty_classes_without_a_label_list(tmp_path):
    make_devkit(tmp_path, {"p1": "aeroplane tvmonitor"}, train=["p1"], labels=None)
    dataset = read(tmp_path, val=())
    assert dataset.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert tags_of(dataset) == {"train": {"p1": (0, 19)}}


def test_read_voc__csv_names_an_unknown_class(tmp_path):
    make_devkit(tmp_path, {"p1": "cat", "p2": "dgo"}, train=["p1"], val=["p2"])
    with pytest.raises(DataError, match=r"image_tags\.csv line 3: unknown class 'dgo' \(did you m"):
        read(tmp_path)


def test_read_voc__val_photo_may_have_no_tag(tmp_path):
    make_devkit(tmp_path, {"p1": "cat", "p2": ""}, train=["p1"], val=["p2"])
    assert tags_of(read(tmp_path))["val"] == {"p2": ()}
    with pytest.raises(DataError, match=r"csv line 3: training photo 'p2' has no tag"):
        read(tmp_path, train="val", val=())


def test_read_voc__list_is_missing(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"])
    with pytest.raises(DataError, match=r"mini\.txt does not exist.*\(train, val\)"):
        read(tmp_path, train="mini")


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ("p1\np9\n", "train.txt line 2: no photo 'p9'"),
        ("p1\n../p1\n", "train.txt line 2: '../p1' leaves the data folder"),
        ("p1\np1\n", "train.txt line 2: 'p1' was already named"),
        ("", "train.txt names no photo"),
        ("p5\n", "train.txt line 1: photo 'p5' has no row in"),
    ],
)
def test_read_voc__faulty_list(tmp_path, listed, says):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"])
    save_photo(tmp_path / "JPEGImages" / "p5.jpg")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(listed)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_voc__a_link_to_nothing_is_no_photo(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1", "p9"], val=["p2"])
    (tmp_path / "JPEGImages" / "p9.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"p9"):
        read(tmp_path)


def test_read_voc__photos_that_share_an_id(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"])
    save_photo(tmp_path / "JPEGImages" / "p1.png")
    with pytest.raises(DataError, match=r"p1\.png and p1\.jpg share the id 'p1'"):
        read(tmp_path)


def test_read_voc__broken_and_missing_xml(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"], xml=True)
    (tmp_path / "Annotations" / "p1.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"p1\.xml cannot be read as XML"):
        read(tmp_path)
    (tmp_path / "Annotations" / "p1.xml").unlink()
    with pytest.raises(DataError, match=r"train\.txt line 1: photo 'p1' has no .*p1\.xml"):
        read(tmp_path)


def test_read_voc__xml_entity_bomb(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1"], val=["p2"], xml=True)
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    start = f'<!DOCTYPE a [<!ENTITY e0 "{"x" * 100}">{levels}]>'
    bomb = f"{start}<a><object><name>&e9;</name></object></a>"
    (tmp_path / "Annotations" / "p1.xml").write_text(bomb)
    with pytest.raises(DataError, match="cannot be read as XML"):
        read(tmp_path)


def test_read_source__train_and_val_overlap_is_said(tmp_path):
    make_devkit(tmp_path, TAGS, train=["p1", "p2"], val=["p2", "p3"])
    recorder = RecordingRecorder()
    read(tmp_path, recorder)
    assert recorder.notes == [
        "1 photos of 'val' are also trained on (first: 'p2'); its scores are not those of unseen "
        "photos"
    ]


def test_read_voc__no_devkit(tmp_path):
    with pytest.raises(DataError, match="holds no JPEGImages folder"):
        read(tmp_path)


def test_read_voc__download_appears_whole(tmp_path, monkeypatch):
    calls = []

    def fetch(root, *, year, image_set, download):
        calls.append((year, image_set, download))
        make_devkit(
            tmp_path / "data/.download/VOCdevkit/VOC2012", TAGS, train=["p1"], val=["p2"], xml=True
        )
        assert root == str(tmp_path / "data/.download")

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fetch)
    for _ in range(2):
        assert len(read(tmp_path / "data", download=True).splits["train"]) == 1
    assert calls == [("2012", "train", True)]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["VOCdevkit"]


def test_read_voc__download_fails(tmp_path, monkeypatch):
    def fail(root, **options):
        raise RuntimeError("File not found\nor corrupted.")

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fail)
    with pytest.raises(DataError, match=r"could not be downloaded .*\(File not found or corrupted"):
        read(tmp_path / "data", download=True)
