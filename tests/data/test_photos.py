"""A folder with `tags.csv`, and each way to write one wrongly."""

import unicodedata

import numpy as np
import pytest

from tests.data.samples import make_folder, save_photo
from wsss_core.config import DataConfig
from wsss_core.data.images import write_mask
from wsss_core.data.labels import read_labels, read_tag_table
from wsss_core.data.photos import read_photos
from wsss_core.data.source import read_source
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError
from wsss_core.observe import SilentRecorder

CONFIG = DataConfig(source="photos")


def read(root, **settings):
    return read_source(DataConfig(source="photos", **settings), root, SilentRecorder())


def ids(dataset):
    return {split: [photo.id for photo in photos] for split, photos in dataset.splits.items()}


def test_read_photos__tags_by_spaces_or_semicolons(tmp_path):
    rows = {"b.jpg": "dog cat", "a.jpg": "cat;dog", "c.png": " horse ; dog;", "d.jpg": "cat  cat"}
    dataset = read_photos(CONFIG, make_folder(tmp_path, rows))
    assert dataset.classes == ("cat", "dog", "horse")
    assert [(photo.id, photo.tags) for photo in dataset.splits["train"]] == [
        ("a", (0, 1)),
        ("b", (0, 1)),
        ("c", (1, 2)),
        ("d", (0,)),
    ]
    assert dataset.splits["train"][2].path == tmp_path / "c.png"
    assert set(dataset.splits) == {"train"}


def test_read_photos__label_list_sets_the_order(tmp_path):
    root = make_folder(
        tmp_path, {"a.jpg": "cat", "b.jpg": "dog"}, labels=["background", "dog", "emu", "cat"]
    )
    dataset = read_photos(CONFIG, root)
    assert dataset.classes == ("dog", "emu", "cat")
    assert [photo.tags for photo in dataset.splits["train"]] == [(2,), (0,)]


def test_read_photos__folders_below_are_part_of_the_id(tmp_path):
    dataset = read_photos(CONFIG, make_folder(tmp_path, {"x/a.jpg": "cat", "./y/a.jpg": "cat"}))
    assert ids(dataset) == {"train": ["x/a", "y/a"]}


@pytest.mark.parametrize(
    ("table", "disk"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD"), (None, None)]
)
def test_read_photos__a_mac_writes_umlauts_in_two_characters(tmp_path, table, disk):
    def write(form, text):
        # without a form: an umlaut of each kind, which neither form is
        mixed = text.replace("ö", "o\u0308").replace("Bä", "Ba\u0308")
        return mixed if form is None else unicodedata.normalize(form, text)

    row, tag = (write(table, text) for text in ("éGröße.jpg", "Bär"))
    save_photo(tmp_path / write(disk, "éGröße.jpg"))
    (tmp_path / "tags.csv").write_text(f"filename,tags\n{row},{tag}\n")
    dataset = read_photos(DataConfig(source="photos"), tmp_path)
    assert dataset.classes == ("Bär",)
    assert dataset.splits["train"][0].id == "éGröße"
    mask = tmp_path / "masks" / write(disk, "éGröße.png")
    write_mask(mask, np.zeros((6, 10), np.uint8))
    assert TruthMasks.of(tmp_path).path("éGröße").is_file()


def test_read_photos__spreadsheet_file(tmp_path):
    root = make_folder(tmp_path, {"a.jpg": "cat"})
    (root / "tags.csv").write_bytes(
        '\ufefftags,note,filename\r\n\r\ncat;dog,"a, b",a.jpg\r\n,,\r\n'.encode()
    )
    assert read_photos(CONFIG, root).splits["train"][0].tags == (0, 1)
    (root / "tags.csv").write_text('filename,tags\na.jpg,"cat, dog"\n')
    assert read_photos(CONFIG, root).classes == ("cat", "dog")


def test_read_photos__lists_of_ids_and_file_names(tmp_path):
    rows = dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.v2.jpg", "e.jpg"), "cat")
    lists = {"train": ["c.jpg", "a", ""], "val": ["d.v2"], "night": ["e.jpg"]}
    root = make_folder(tmp_path, rows, lists=lists)
    assert ids(read(root)) == {"train": ["a", "c"], "val": ["d.v2"]}
    assert ids(read(root, val=("val", "night")))["night"] == ["e"]
    with pytest.raises(DataError, match=r"gone\.txt does not exist; write it, or name another"):
        read(root, val=("val", "gone"))
    assert ids(read(root, train="val", val=())) == {"train": ["d.v2"]}
    (root / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt does not exist; write it"):
        read(root, train="val", val=())


def test_read_photos__without_a_train_list_val_photos_are_kept_out(tmp_path):
    rows = dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), "cat")
    root = make_folder(tmp_path, rows, lists={"val": ["b"]})
    assert ids(read(root)) == {"train": ["a", "c"], "val": ["b"]}


def test_read_source__limit_takes_the_first_ids_of_each_split(tmp_path):
    rows = dict.fromkeys(("c.jpg", "a.jpg", "d.jpg", "b.jpg"), "cat")
    root = make_folder(tmp_path, rows, lists={"train": ["c", "b", "d"], "val": ["a"]})
    assert ids(read(root, limit=2)) == {"train": ["b", "c"], "val": ["a"]}


def fault_of_table(tmp_path, text, labels=None, **lists) -> str:
    root = make_folder(tmp_path / "data", {"a.jpg": "cat", "b.jpg": "dog"}, labels=labels)
    save_photo(root / "a.png")
    (root / "tags.csv").write_text(text)
    for name, entries in lists.items():
        (root / f"{name}.txt").write_text(entries)
    with pytest.raises(DataError) as caught:
        read(root)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{root}/", "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "tags.csv line 1: holds nothing"),
        ("filename,tags\n", "tags.csv holds no photo"),
        ("filename;tags\na.jpg;cat\n", "tags.csv line 1: holds the columns 'filename;tags'"),
        ("file,tags\na.jpg,cat\n", "expected the columns `filename,tags`"),
        ("filename,tags\na.jpg,cat\nb.jpg,dog,cat\n", "tags.csv line 3: has 3 cells"),
        ("filename,tags\na.jpg\n", "tags.csv line 2: has 1 cells"),
        ("filename,tags\na.jpg,cat\n../a.jpg,cat\n", "line 3: '../a.jpg' leaves the data folder"),
        ("filename,tags\nx/../../a.jpg,cat\n", "leaves the data folder"),
        ("filename,tags\n..\\a.jpg,cat\n", "leaves the data folder"),
        ("filename,tags\n/a.jpg,cat\n", "line 2: '/a.jpg' is an absolute path"),
        ("filename,tags\nC:\\a.jpg,cat\n", "is an absolute path"),
        ("filename,tags\na.jpg,cat\n\na.jpg,dog\n", "line 4: 'a.jpg' was already on line 2"),
        ("filename,tags\na.jpg,cat\n./a.jpg,dog\n", "line 3: 'a.jpg' was already on line 2"),
        ("filename,tags\na.jpg,cat\na.png,dog\n", "'a.png' and 'a.jpg' of line 2 would share the"),
        ("filename,tags\na.jpg,cat\nb.jpg,\n", "tags.csv line 3: 'b.jpg' has no tag"),
        ("filename,tags\na.jpg, ; \n", "tags.csv line 2: 'a.jpg' has no tag"),
        ("filename,tags\n ,cat\n", "tags.csv line 2: the file name is empty"),
        ("filename,tags\nc.jpg,cat\n", "tags.csv line 2: no photo 'c.jpg' in"),
        ("filename,tags\na.jpg,background cat\n", "line 2: unknown class 'background' (it is in"),
        ('filename,tags\na.jpg,"cat\n', "unexpected end of data"),
        ('filename,tags\n"' + "a\n" * 200 + '",cat\n', "look for a quote that is not closed"),
    ],
)
def test_read_photos__faulty_table(tmp_path, text, says):
    assert says in fault_of_table(tmp_path, text)


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("dgo", "line 2: unknown class 'dgo' (did you mean 'dog'?)"),
        ("CAT", "line 2: unknown class 'CAT' (did you mean 'cat'?)"),
        ("zebra", "line 2: unknown class 'zebra' (known: cat, dog)"),
    ],
)
def test_read_photos__unknown_class(tmp_path, tag, says):
    labels = ["background", "cat", "dog"]
    assert says in fault_of_table(tmp_path, f"filename,tags\na.jpg,{tag}\n", labels)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("a\nc\n", "train.txt line 2: 'c' is not in the tag table"),
        ("a\n\na\n", "train.txt line 3: 'a' was already named"),
        ("../a\n", "train.txt line 1: '../a' leaves the data folder"),
        ("\n", "train.txt names no photo"),
    ],
)
def test_read_photos__faulty_list(tmp_path, entries, says):
    assert says in fault_of_table(tmp_path, "filename,tags\na.jpg,cat\n", train=entries)


def test_read_photos__named_files_must_exist(tmp_path):
    root = make_folder(tmp_path, {"a.jpg": "cat"})
    for settings in ({"train": "mini"}, {"tags": "other.csv"}, {"labels": "names.txt"}):
        with pytest.raises(DataError, match="does not exist"):
            read(root, **settings)


def test_read_source__no_folder_and_no_table(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        read(tmp_path / "gone")
    with pytest.raises(DataError, match=r"tags\.csv does not exist"):
        read(tmp_path)


def test_read_source__val_may_not_be_called_train(tmp_path):
    root = make_folder(tmp_path, {"a.jpg": "cat"})
    with pytest.raises(DataError, match=r"data\.val names 'train'"):
        read(root, val=("train",))


def test_read_tag_table__not_utf8(tmp_path):
    (tmp_path / "tags.csv").write_bytes("filename,tags\nä.jpg,cat\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_tag_table(tmp_path / "tags.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat\ndog\n", "begins with 'cat'; expected a list of classes with 'background' first"),
        ("", "begins with ''"),
        ("background\n", "names 0 classes; expected 1 to 254"),
        ("background\ncat\ndog\ncat\n", "line 4: 'cat' was already on line 2"),
        ("background\ndining table\n", "line 2: 'dining table' holds a space"),
        ("background\n" + "\n".join(f"c{n}" for n in range(255)), "names 255 classes"),
    ],
)
def test_read_labels__faulty(tmp_path, text, says):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        read_labels(tmp_path / "labels.txt")
    assert says in str(caught.value)
