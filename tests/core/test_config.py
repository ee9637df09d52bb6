"""The settings tree: what is refused, in which words, and what a digest depends on."""

import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from wsss_core.config import Config, lay_over, load_recipe, parse_config
from wsss_core.errors import SettingsError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def walk(model, path=()):
    """(dotted name, field) of every leaf below a settings class."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from walk(kind, (*path, name))
        else:
            yield ".".join((*path, name)), field


LEAVES = dict(walk(Config))


def is_number(kind):
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(is_number(part) for part in typing.get_args(kind))
    return kind in (int, float)


@pytest.mark.parametrize("name", LEAVES)
def test_fields__every_one_says_what_it_is(name):
    description = LEAVES[name].description
    assert description
    assert description.endswith((".", ")"))


@pytest.mark.parametrize("name", [n for n, f in LEAVES.items() if is_number(f.annotation)])
def test_fields__every_number_has_a_lower_bound(name):
    bounds = {type(bound).__name__ for bound in LEAVES[name].metadata}
    assert bounds & {"Ge", "Gt"}


def put(name, value):
    """A tree with one leaf."""
    *path, leaf = name.split(".")
    tree = {leaf: value}
    for part in reversed(path):
        tree = {part: tree}
    return tree


@pytest.mark.parametrize("name", LEAVES)
def test_fields__defaults_pass_as_json(name):
    """What `run.json` stores can be read back."""
    value = Config().model_dump(mode="json")
    for part in name.split("."):
        value = value[part]
    assert parse_config(put(name, value)) == Config()


MESSAGES = [
    ({"classifer": {}}, "unknown setting 'classifer' (did you mean 'classifier'?)"),
    (
        {"causal": {"contxt": "none"}, "seeds": {"treshold": 1}},
        "unknown setting 'causal.contxt' (did you mean 'causal.context'?); "
        "unknown setting 'seeds.treshold' (did you mean 'seeds.threshold'?)",
    ),
    (
        {"classifier": {"training": {"epoch": 1}}},
        "unknown setting 'classifier.training.epoch' (did you mean 'classifier.training.epochs'?)",
    ),
    (
        {"segmenter_test": {"crf_params": {"iteration": 1}}},
        "unknown setting 'segmenter_test.crf_params.iteration' "
        "(did you mean 'segmenter_test.crf_params.iterations'?)",
    ),
    ({"tracking": {"zz": 1}}, "unknown setting 'tracking.zz' (known here: panels)"),
    ({"rounds": 21}, "rounds: should be less than or equal to 20, not 21"),
    ({"seeds": {"threshold": 1.5}}, "seeds.threshold: should be less than 1 or 'auto', not 1.5"),
    (
        {"expansion": {"irn": {"log2_steps": "some"}}},
        "expansion.irn.log2_steps: should be a valid integer, unable to parse string as an integer "
        "or 'auto', not 'some'",
    ),
    (
        {"classifier": {"init": "segmenter", "backbone": "resnet50"}},
        "classifier.init: a classifier of backbone 'resnet50' cannot start from a segmenter of "
        "'lite0'; set classifier.backbone and segmenter.backbone to the same",
    ),
    (
        {"rounds": "two"},
        "rounds: should be a valid integer, unable to parse string as an integer, not 'two'",
    ),
    ({"data": None}, "data: should be a valid dictionary or instance of DataConfig, not None"),
    (
        {"data": {"source": "coco"}},
        "data.source: should be 'scenes', 'voc' or 'photos', not 'coco'",
    ),
    ({"data": {"val": "val"}}, "data.val: should be a list, not 'val'"),
    ({"data": {"val": ["val", 3]}}, "data.val.1: should be a valid string, not 3"),
    ({"data": {"limit": 0}}, "data.limit: should be greater than or equal to 1, not 0"),
    (
        {"data": {"scenes": {"confounding": 1}}},
        "data.scenes.confounding: should be less than 1, not 1",
    ),
    ({"name": "A b"}, "name: String should match pattern '^[a-z0-9][a-z0-9_-]{0,40}$', not 'A b'"),
    ({"classifier": {"output_stride": 32}}, "classifier.output_stride: should be 8 or 16, not 32"),
    (
        {"classifier": {"training": {"learning_rate": float("nan")}}},
        "classifier.training.learning_rate: should be a finite number, not nan",
    ),
    (
        {"segmenter": {"training": {"poly_power": float("inf")}}},
        "segmenter.training.poly_power: should be a finite number, not inf",
    ),
    (
        {"classifier": {"training": {"long_side_px": [300, 200]}}},
        "classifier.training: long_side_px must be an ascending pair in 16..4096, not [300, 200]",
    ),
    (
        {"classifier": {"training": {"long_side_px": [8, 200]}}},
        "classifier.training: long_side_px must be an ascending pair in 16..4096, not [8, 200]",
    ),
    (
        {"classifier": {"training": {"long_side_px": [300]}}},
        "classifier.training.long_side_px.1: Field required",
    ),
    ({"seeds": {"scales": []}}, "seeds.scales: should be numbers in (0, 8], not []"),
    ({"seeds": {"scales": [1, 0]}}, "seeds.scales: should be numbers in (0, 8], not [1.0, 0.0]"),
    (
        {"segmenter_test": {"scales": [9]}},
        "segmenter_test.scales: should be numbers in (0, 8], not [9.0]",
    ),
    ({"seeds": {"method": "folder"}}, "seeds: folder is needed by, and only by, method 'folder'"),
    ({"seeds": {"folder": "cams"}}, "seeds: folder is needed by, and only by, method 'folder'"),
    (
        {"expansion": {"method": "folder"}},
        "expansion: folder is needed by, and only by, method 'folder'",
    ),
    (
        {"expansion": {"method": "crf", "folder": "masks"}},
        "expansion: folder is needed by, and only by, method 'folder'",
    ),
    (
        {"expansion": {"irn": {"background": 0.4}}},
        "expansion.irn: background 0.4 must not exceed foreground 0.3",
    ),
    (
        {"causal": {"adjustment": "sum"}},
        "causal.adjustment: should be 'nwgm' or 'exact', not 'sum'",
    ),
    (
        {"causal": {"exact_samples": 2}},
        "causal: exact_samples is read by adjustment 'exact' alone",
    ),
    (
        {"causal": {"adjustment": "exact", "context": "seg_mask"}},
        "causal: context 'seg_mask' has no confounders that 'exact' could sum over",
    ),
    (
        {"seed": -1, "round": 1},
        "seed: should be greater than or equal to 0, not -1; "
        "unknown setting 'round' (did you mean 'rounds'?)",
    ),
]


@pytest.mark.parametrize(("tree", "message"), MESSAGES)
def test_parse_config__fault_is_answered_in_these_words(tree, message):
    with pytest.raises(SettingsError) as caught:
        parse_config(tree)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_parse_config__folder_methods():
    config = parse_config(
        {
            "seeds": {"method": "folder", "folder": "cams"},
            "expansion": {"method": "folder", "folder": "masks"},
        }
    )
    assert (config.seeds.folder, config.expansion.folder) == (Path("cams"), Path("masks"))


def test_parse_config__group_given_in_part_keeps_the_rest_of_its_own_default():
    """The segmenter's optimiser is not the classifier's, whichever of its settings is changed."""
    default = Config().segmenter.training
    assert default != Config().classifier.training
    config = parse_config({"segmenter": {"training": {"epochs": 3}}})
    assert config.segmenter.training == default.model_copy(update={"epochs": 3})
    config = parse_config({"segmenter_test": {"crf_params": {"iterations": 2}}})
    assert config.segmenter_test.crf_params.bilateral_sxy == 67


def test_lay_over__a_part_keeps_the_rest_and_a_table_is_replaced():
    tree = {"seed": 3, "data": {"source": "photos"}, "threshold_changes": {1: 0.2}}
    config = parse_config(tree)
    changed = lay_over(config, {"rounds": 0, "data": {"scenes": {"photos": 9}}})
    assert changed == parse_config(
        tree | {"rounds": 0, "data": {"source": "photos", "scenes": {"photos": 9}}}
    )
    assert lay_over(config, {"threshold_changes": {2: 0.3}}).threshold_changes == {2: 0.3}
    assert lay_over(config, config.model_dump(mode="json")) == config
    with pytest.raises(SettingsError, match="sedes"):
        lay_over(config, {"sedes": {}})


def test_config__is_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.classifier.training.epochs = 1


def test_config__defaults_of_the_papers_and_their_code():
    config = Config()
    training = config.classifier.training
    assert (training.epochs, training.batch_size, training.crop_px) == (5, 16, 512)
    assert (training.learning_rate, training.head_rate_ratio) == (0.1, 10.0)
    assert (training.momentum, training.weight_decay, training.poly_power) == (0.9, 1e-4, 0.9)
    assert training.long_side_px == (320, 640)
    assert config.seeds.scales == (1.0, 0.5, 1.5, 2.0)
    assert config.seeds.threshold == 0.15
    crf = config.expansion.crf
    assert (crf.iterations, crf.gaussian_sxy, crf.gaussian_compat) == (10, 3, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_compat) == (50, 5, 10)
    irn = config.expansion.irn
    assert (irn.foreground, irn.background, config.expansion.hard_confidence) == (0.30, 0.05, 0.7)
    assert (irn.boundary.radius, irn.radius, irn.beta, irn.log2_steps) == (10, 5, 10, 8)
    assert irn.threshold == 0.25
    training = irn.boundary.training
    assert (training.epochs, training.batch_size, training.crop_px) == (3, 32, 512)
    assert (training.learning_rate, training.weight_decay) == (0.1, 1e-4)
    assert training.momentum == training.weight_decay  # irn's swapped argument
    crf = config.segmenter_test.crf_params
    assert (crf.gaussian_sxy, crf.gaussian_compat) == (1, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_compat) == (67, 3, 4)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_load_recipe__those_that_ship(path):
    config = load_recipe(path)
    assert config.name.replace("-", "_") == path.stem


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_load_recipe__overrides_win_and_are_read_as_yaml(tmp_path):
    path = write(tmp_path, "seed: 1\ndata:\nclassifier:\n  training: {epochs: 3}\n")
    config = load_recipe(
        path,
        [
            "seed=7",
            "classifier.training.learning_rate=1e-3",
            "classifier.training.clip_norm=null",
            "seeds.scales=[1.0, 2]",
            "data.limit=4",
            "data.val=[]",
            "classifier.pretrained=no",
            "segmenter.backbone=resnet50",
        ],
    )
    assert config.seed == 7
    assert config.classifier.training.epochs == 3
    assert config.classifier.training.learning_rate == 1e-3
    assert config.classifier.training.clip_norm is None
    assert config.seeds.scales == (1.0, 2.0)
    assert (config.data.limit, config.data.val) == (4, ())
    assert config.classifier.pretrained is False
    assert config.segmenter.backbone == "resnet50"


def test_load_recipe__empty_file_is_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set 'seed' is not of the form a.b=value"),
        ("=3", "--set '=3' is not of the form a.b=value"),
        ("seed=[1", "--set seed: '[1' is not a YAML value"),
        ("seed.x=1", "--set seed.x: 'seed' is a value, not a group of settings"),
        ("sed=1", "unknown setting 'sed' (did you mean 'seed'?)"),
        (
            "classifier.traning.epochs=1",
            "unknown setting 'classifier.traning' (did you mean 'classifier.training'?)",
        ),
    ],
)
def test_load_recipe__bad_override(tmp_path, override, message):
    with pytest.raises(SettingsError) as caught:
        load_recipe(write(tmp_path, "seed: 1\n"), [override])
    assert str(caught.value) == message


def test_load_recipe__missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"no recipe at {path}; the ones that ship are in recipes/"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "cannot be read as YAML: while parsing"),
        (b"a: \xff\xfe", "cannot be read as YAML:"),
        (b"- 1\n- 2\n", "holds list; expected settings as `name: value`"),
        (b"seed", "holds str; expected settings as `name: value`"),
    ],
)
def test_load_recipe__what_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path} {message}")
    assert "\n" not in str(caught.value)


def test_load_recipe__folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read as YAML"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"rounds": 7},
        {"tracking": {"panels": "none"}},
        {"data": {"root": "/somewhere", "download": True}},
        {"evaluation": {"stop_stability": 0.9}},
        {"runtime": {"device": "cpu", "threads": 7, "devices": 2, "workers": 3}},
        {"runtime": {"runner": "dask", "dask_address": "tls://far.away:8786"}},
        {"review": True},
    ],
)
def test_digest__where_and_how_fast_do_not_count(tree):
    assert parse_config(tree).digest() == Config().digest()


@pytest.mark.parametrize(
    "tree",
    [
        {"seed": 1},
        {"name": "other"},
        {"supervision": "truth"},
        {"data": {"limit": 5}},
        {"data": {"scenes": {"confounding": 0.5}}},
        {"classifier": {"training": {"epochs": 6}}},
        {"causal": {"context": "none"}},
        {"causal": {"segmenter_share": 0.5}},
        {"causal": {"slice_init": "random"}},
        {"causal": {"attention_std": 0.1}},
        {"causal": {"amplitude": 30}},
        {"seeds": {"threshold": 0.2}},
        {"threshold_changes": {1: 0.2}},
        {"expansion": {"crf": {"iterations": 1}}},
        {"segmenter": {"head": "deeplabv3plus"}},
        {"segmenter_test": {"flip": False}},
        {"runtime": {"precision": "amp"}},
    ],
)
def test_digest__what_changes_a_result_counts(tree):
    digest = parse_config(tree).digest()
    assert len(digest) == 8
    assert digest != Config().digest()


@pytest.mark.parametrize(
    "address",
    ["tls://far.away:8786", "tcp://127.0.0.1:8786", "localhost:8786", "tcp://[::1]:8786"],
)
def test_dask_address__tls_or_this_machine(address):
    tree = {"runtime": {"runner": "dask", "dask_address": address}}
    assert parse_config(tree).runtime.dask_address == address


@pytest.mark.parametrize(
    "address",
    [
        "tcp://far.away:8786",
        "10.0.0.7:8786",
        "tcp://0.0.0.0:8786",
        "tcp://127.0.0.1",
        "ws://127.0.0.1:8786",
        "tls://far.away:port",
        "",
    ],
)
def test_dask_address__what_the_network_could_reach_is_refused(address):
    tree = {"runtime": {"runner": "dask", "dask_address": address}}
    with pytest.raises(SettingsError, match="must be tls://HOST:PORT, or a port of this machine"):
        parse_config(tree)


def test_dask_address__of_no_use_to_another_runner():
    with pytest.raises(SettingsError, match="dask_address is read by runner 'dask' alone"):
        parse_config({"runtime": {"dask_address": "tls://far.away:8786"}})


def test_at_round__the_latest_change_until_it():
    config = parse_config({"seeds": {"threshold": 0.1}, "threshold_changes": {"2": 0.3, "1": 0.2}})
    assert [config.at_round(t).seeds.threshold for t in range(4)] == [0.1, 0.2, 0.3, 0.3]
    assert config.at_round(2).seeds.scales == config.seeds.scales


@pytest.mark.parametrize("network", ["classifier", "segmenter"])
def test_config__batch_norm_does_not_learn_from_parts_of_batches(network):
    tree = {"runtime": {"devices": 2}, network: {"freeze_bn": False}}
    with pytest.raises(SettingsError, match=f"{network}.freeze_bn false: it would learn from each"):
        parse_config(tree)
    assert parse_config({network: {"freeze_bn": False}}).runtime.devices == 1


def test_parse_config__exact_passes_a_photo_several_times():
    free = {"classifier": {"freeze_bn": False}}
    with pytest.raises(SettingsError, match=r"classifier.freeze_bn false: causal.adjustment 'exac"):
        parse_config(free | {"causal": {"adjustment": "exact"}})
    assert parse_config(free).causal.adjustment == "nwgm"


def test_runtime__several_devices_are_not_one_gpu():
    with pytest.raises(SettingsError, match="device 'cuda:1' is one GPU; for devices 2 say auto"):
        parse_config({"runtime": {"device": "cuda:1", "devices": 2}})
    assert parse_config({"runtime": {"device": "cuda:1"}}).runtime.devices == 1


def test_causal__settings_that_are_gone_are_forgotten_where_they_did_nothing():
    config = parse_config({"causal": {"clusters": 0, "x_m": "self", "scale": "paper"}})
    assert config == parse_config({"causal": {"scale": "paper"}})
    for setting in ({"clusters": 8}, {"x_m": "crossfit"}, {"context": "features"}):
        name = next(iter(setting))
        with pytest.raises(SettingsError, match=f"^causal: {name}.* was taken out, for it did not"):
            parse_config({"causal": setting})


def test_digest__of_the_first_release_is_that_of_today():
    """A new setting has to be left out at its default, or every run made before has lost its name.

    A default that changes on purpose changes this number, and belongs in the changelog.
    """
    assert Config().digest() == "71c0c76c"
