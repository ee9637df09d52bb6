"""The command `conta`. Each verb imports what it needs itself, so that `--help` is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from flows.runs import Run
    from wsss_core.evaluation.report import Report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a semantic segmenter from image-level tags, and take the confounding context out "
    "of it.\n\nStart with `conta run recipes/scenes.yaml`. What a run makes lies in the folder "
    "that CONTA_HOME names, by default ./.conta; the same command again continues a run.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong use or bad input.",
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
store_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data", help="Check your photos and tags, or generate scenes.")
app.add_typer(export_app, name="export", help="Hand results to other tools.")
app.add_typer(store_app, name="store", help="See what takes the disk, and clear it away.")

STAGES = (
    "classifier, cams, boundary_labels, boundary, masks, segmenter, predictions, test or "
    "confounders"
)

RunName = Annotated[
    str,
    typer.Argument(metavar="RUN[:ROUND]", help="Name of a run, its beginning, or `latest`."),
]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file with settings.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of your photos (data.root).")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Rounds after round 0 (rounds).")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed of every stage.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Change one setting; repeatable."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help=f"Stop in round 0 after this: {STAGES}.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Use the first N photos of each list.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what is done and what would be computed.")
    ] = False,
) -> None:
    """Run a recipe, or continue it where it stopped.

    Prints one table: rounds down, scores across. What is already computed is taken from the store.
    """
    from flows.environment import open_home
    from wsss_core.config import load_recipe

    sugar = {"data.root": data and str(data), "rounds": rounds, "seed": seed, "data.limit": limit}
    given = [f"{name}={json.dumps(value)}" for name, value in sugar.items() if value is not None]
    config = load_recipe(recipe, [*given, *(settings or [])])
    home = open_home()
    from flows.launch import execute, plan

    if dry_run:
        for row in plan(config, home=home, until=until):
            typer.echo(row)
        return
    _say_done(execute(config, home=home, until=until), home)


def _say_done(done: Run, home: Path) -> None:
    from flows.runs import round_table, run_folder

    typer.echo(round_table(done))
    typer.echo(
        f"\nrun {done.name}\n"
        f"  files     {run_folder(home, done.name)}\n"
        f"  charts    conta ui\n"
        f"  compare   conta compare\n"
        f"  predict   conta predict PHOTOS --model {done.name} -o OUT"
    )


@app.command()
def resume(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Name of a run, its beginning, or `latest`."),
    ] = None,
) -> None:
    """Finish a run that stopped, or list those that did.

    The list says where each stopped, when and why. A run is finished by the settings and the data
    folder of its latest start.
    """
    from flows.environment import open_home
    from flows.runs import find_run

    home = open_home()
    if run is None:
        from flows.unfinished import unfinished_table

        typer.echo(unfinished_table(home))
        return
    found = find_run(home, run)
    if found.status == "finished":
        typer.echo(f"run {found.name} is finished; see it by: conta compare {found.name}")
        return
    from flows.launch import resume as finish

    _say_done(finish(found, home=home), home)


@app.command()
def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN ...]", help="Runs; all if none is named.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every metric as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one page with charts and panels.")
    ] = None,
) -> None:
    """Compare the rounds of runs in one table.

    The page of --html needs nothing but itself; it is kept with the runs in MLflow too.
    """
    from flows.environment import open_home
    from flows.runs import compare_rows, compare_table, find_run, list_runs, say_no_runs

    home = open_home()
    chosen = [find_run(home, name) for name in runs] if runs else list_runs(home)
    if html is not None and chosen:
        typer.echo(_write_page(chosen, home, html), err=True)
    if as_json:
        typer.echo(json.dumps(compare_rows(chosen), indent=1))
    elif chosen:
        typer.echo(compare_table(chosen))
    else:
        typer.echo(say_no_runs(home))


def _write_page(chosen: list[Run], home: Path, file: Path) -> str:
    """Write the page of `compare --html`; returns a line that says where."""
    from flows.environment import set_defaults

    set_defaults(home)
    from flows.page import compare_page
    from tasks.tracking import keep_page
    from wsss_core.errors import InputError
    from wsss_core.store import Store, write_atomically

    page = compare_page(chosen, store=Store(home / "store"))
    try:
        write_atomically(file, page.encode())
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}); name another file"
        ) from None
    problem = keep_page([run.mlflow_run for run in chosen if run.mlflow_run], file)
    return f"{file}" if problem is None else f"{file}; not in MLflow ({problem})"


@app.command()
def study(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file with the arms.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of your photos (data.root).")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="Folder of all studies' cells.")
    ] = Path("docs/studies"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute nothing; compare the tables with the cells.")
    ] = False,
) -> None:
    """Run what is missing of a study and print its tables.

    Every arm under every seed is one small file in OUT, made to be committed. The tables are made
    of these files alone; --verify makes them again and compares them with those written down, and
    with those that findings.md beside OUT quotes.
    """
    from flows.environment import resolve_home
    from flows.study import check_folder, find_cells, list_missing, load_study
    from flows.study_tables import verify as verify_tables
    from flows.study_tables import write_tables

    asked = load_study(study)
    folder = out / asked.name
    if verify:
        typer.echo(verify_tables(asked, folder, findings=out.parent / "findings.md"))
        return
    missing = list_missing(asked, find_cells(asked, folder))
    if missing:
        from flows.launch import execute_study

        check_folder(asked, folder)
        num = len(asked.arms) * len(asked.seeds)
        typer.echo(f"{len(missing)} of {num} cells are missing in {folder}", err=True)
        execute_study(asked, home=resolve_home(), folder=folder.absolute(), data=data)
    typer.echo(write_tables(asked, folder))


@app.command()
def promote(
    model: RunName,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the best round has most of, as seg_val/miou."),
    ] = None,
) -> None:
    """Make a round's segmenter the champion.

    A run's best round, or the one you name, goes to the model registry of MLflow with its scores;
    `conta predict` and `conta serve` find it there as `champion`. Without --metric the best is by
    mIoU on the first val list with true masks, or by tag agreement if none has any.
    """
    from flows.champion import promote as make_champion
    from flows.environment import open_home
    from wsss_core.observe import ConsoleRecorder

    make_champion(open_home(), model, metric=metric, recorder=ConsoleRecorder(), say=typer.echo)


@app.command()
def predict(
    photos: Annotated[
        Path, typer.Argument(metavar="PHOTOS", help="A photo or a folder of photos.")
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="RUN[:ROUND]", help="Whose segmenter, a run's last by default; or `champion`."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder of the masks.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also lay the masks over their photos.")
    ] = False,
) -> None:
    """Segment photos with the segmenter of a run, or the champion.

    Each photo gets a PNG of its own size whose pixel value is the class (names: OUT/labels.txt). A
    photo that cannot be read costs one line; the others get their masks.
    """
    from flows.champion import load_predictor
    from flows.environment import open_home
    from wsss_core.errors import ContaError
    from wsss_core.observe import ConsoleRecorder

    _, predictor = load_predictor(open_home(), model)
    from wsss_core.stages.predict import predict_folder

    done = predict_folder(
        photos, predictor=predictor, recorder=ConsoleRecorder(), out=out, overlay=overlay
    )
    if not done.masks:
        raise ContaError(f"none of the {len(done.failures)} photos in {photos} could be read")
    failed = f", {len(done.failures)} photos could not be read" if done.failures else ""
    typer.echo(f"{len(done.masks)} masks in {out}{failed}")


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(metavar="RUN[:ROUND]", help="Whose segmenter.")
    ] = "champion",
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to serve.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="0 takes a free one.")] = 8000,
) -> None:
    """Answer photos with masks over HTTP.

    POST a photo's file to /segment; the answer is a palette PNG of its size, and /labels names the
    classes. It takes the token that CONTA_TOKEN holds; without one it makes one up and prints it. A
    network is served with a token of yours alone. Ctrl-C ends it.
    """
    import functools

    from flows.champion import load_predictor
    from flows.environment import open_home
    from flows.serve import TOKEN, build_app, choose_token, open_socket
    from flows.serve import serve as answer

    home = open_home()
    token, made_up = choose_token(host)
    listener = open_socket(host, port)
    name, predictor = load_predictor(home, model)
    from wsss_core.stages.predict import LIMIT_PX

    typer.echo(f"{name}: {', '.join(predictor.labels)}")
    segment = functools.partial(predictor.segment_file, limit_px=LIMIT_PX)
    app = build_app(segment, predictor.labels, token=token)
    answer(app, listener, hint=token if made_up else f"${TOKEN}", say=typer.echo)


@app.command()
def score(
    masks: Annotated[
        Path, typer.Argument(metavar="MASKS", help="Folder of mask PNGs, of any origin.")
    ],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="Folder of the true masks.")],
    labels: Annotated[
        Path, typer.Option(metavar="FILE", help="Class names, one a line, background first.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Score masks against true masks of the same file names.

    mIoU over all pixels of all masks, background included, 255 ignored.
    """
    from wsss_core.observe import ConsoleRecorder
    from wsss_core.stages.scores import score_folder

    report = score_folder(masks, truth, labels, recorder=ConsoleRecorder())
    typer.echo(report.model_dump_json(indent=1) if as_json else _score_table(report))


def _score_table(report: Report) -> str:
    def percent(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:6.1f}"

    width = max(map(len, report.iou))
    rows = [f"{'':<{width}}    IoU  precis  recall"]
    rows += [
        f"{name:<{width}} {percent(report.iou[name])}  {percent(report.precision[name])}"
        f"  {percent(report.recall[name])}"
        for name in report.iou
    ]
    rows.append(f"{'mean':<{width}} {percent(report.miou)}")
    absent = f"; not in the mean, for they occur nowhere: {', '.join(report.absent)}"
    return "\n".join([*rows, f"{report.photos} photos{absent if report.absent else ''}"])


@export_app.command("masks")
def export_masks(
    model: RunName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write to.")],
) -> None:
    """Write a round's pseudo-masks in VOC's layout.

    Palette PNGs in SegmentationClass, the list of photos in ImageSets/Segmentation/train.txt and
    the class names in labels.txt.
    """
    from flows.environment import open_home
    from flows.runs import find_round
    from wsss_core.observe import ConsoleRecorder
    from wsss_core.stages.export import export_masks as export
    from wsss_core.stages.stage import Workspace

    home = open_home()
    found, chosen = find_round(home, model, stage="masks")
    work = Workspace(home, recorder=ConsoleRecorder())
    count = export(chosen.manifests["masks"], data=found.photos, work=work, out=out)
    typer.echo(f"{count} masks in {out / 'SegmentationClass'}")


@export_app.command("onnx")
def export_onnx(
    model: RunName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write.")],
) -> None:
    """Write a round's segmenter as an ONNX file.

    It takes RGB photos of 0..255 whose sides are multiples of 16 and gives class probabilities.
    Before it is kept, onnxruntime has to say of a photo of the run what torch says. Needs the extra
    `onnx`.
    """
    from flows.environment import open_home
    from flows.launch import check_data_root
    from flows.runs import find_round

    home = open_home()
    found, chosen = find_round(home, model)
    from wsss_core.stages.onnx import export_onnx as export
    from wsss_core.stages.stage import Workspace

    root = Path(found.data_root) if found.data_root else None
    check_data_root(found, root)
    work = Workspace(home, root)
    segmenter = work.store.open(chosen.manifests["segmenter"])
    data = work.dataset(found.photos)
    photo = data.splits["train"][0].path
    parity = export(segmenter, out, photo=photo)
    height, width = parity.size
    typer.echo(
        f"{out}; on {photo.name} at {height} x {width} its probabilities differ from torch's by at "
        f"most {parity.difference:.1e}, the best class in {parity.changed:.2%} of the pixels"
    )


@data_app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of your photos and tags.")],
) -> None:
    """Check your photos and tags.

    Counts photos, classes and company, names everything that is wrong, and warns of classes that
    tags cannot tell apart.
    """
    from wsss_core.config import DataConfig
    from wsss_core.data.check import check_data
    from wsss_core.errors import DataError
    from wsss_core.observe import ConsoleRecorder

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder that holds tags.csv")
    report = check_data(DataConfig(), folder, ConsoleRecorder())
    typer.echo("\n".join(report.lines()))
    if report.faults:
        raise typer.Exit(2)


@data_app.command()
def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    photos: Annotated[int, typer.Option(metavar="N", help="Number of training scenes.")] = 300,
    size: Annotated[int, typer.Option(metavar="PX", help="Side of a scene, in pixels.")] = 128,
    confounding: Annotated[
        float, typer.Option(metavar="R", help="How much the context misleads, from 0 to below 1.")
    ] = 0.9,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the generator.")] = 0,
) -> None:
    """Generate small pictures with a known causal graph.

    They come in VOC's layout with tags, true masks and a map of each pixel's role.
    """
    from wsss_core.config import parse_config
    from wsss_core.data.scenes import write_scenes
    from wsss_core.errors import StoreError
    from wsss_core.observe import ConsoleRecorder

    tree = {"photos": photos, "size_px": size, "confounding": confounding, "seed": seed}
    config = parse_config({"data": {"scenes": tree}})
    try:
        write_scenes(out, config.data.scenes, ConsoleRecorder())
    except OSError as error:
        raise StoreError(
            f"{error.filename or out} cannot be written ({error.strerror}); give another folder"
        ) from error
    typer.echo(f"scenes in {out}; look at them, then: conta data check {out}")


@store_app.command()
def du() -> None:
    """Show what takes the disk.

    By stage and by folder; needless is what no run refers to.
    """
    from flows.environment import open_home
    from flows.house import disk_table

    typer.echo(disk_table(open_home()))


@store_app.command()
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be removed.")
    ] = False,
) -> None:
    """Remove what no run refers to.

    Artifacts that no run in the home refers to, checkpoints of what is finished, and what dead
    processes left half written. To give up a run, delete its folder in CONTA_HOME/runs first.
    """
    from flows.environment import open_home
    from flows.house import collect

    collect(open_home(), dry_run=dry_run, say=typer.echo)


@app.command()
def ui() -> None:
    """Show your runs in the browser.

    Serves Prefect's and MLflow's pages of this home until Ctrl-C.
    """
    from flows.environment import open_home
    from flows.servers import start_ui

    start_ui(open_home(), say=typer.echo)


@app.command()
def deploy(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE ...", help="YAML files with settings.")
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of your photos (data.root).")
    ] = None,
    cron: Annotated[
        str | None, typer.Option(metavar="CRON", help="Start each at these times as well.")
    ] = None,
) -> None:
    """Let runs be started from Prefect's page.

    Serves the recipes from this machine until Ctrl-C. The form on the page shows every setting and
    refuses bad values; runs go one at a time. Needs a `conta ui` or a Prefect server of your own.
    """
    from flows.environment import open_home
    from wsss_core.config import load_recipe

    given = [] if data is None else [f"data.root={json.dumps(str(data))}"]
    loaded = [load_recipe(recipe, given) for recipe in recipes]
    home = open_home()
    from flows.launch import deploy as serve

    serve(loaded, home=home, cron=cron, say=typer.echo)


@app.command()
def env() -> None:
    """Print what lets plain `prefect` and `mlflow` see your runs.

    Use it as `eval "$(conta env)"`. What this shell has set already is kept, so take a fresh one
    for another home.
    """
    from flows.environment import describe_environment, resolve_home, write_exports
    from flows.servers import name_servers

    home = resolve_home()
    for line in write_exports({**describe_environment(home), **name_servers(home)}):
        typer.echo(line)


@app.command()
def doctor() -> None:
    """Check this installation, line by line.

    A problem comes with what to do about it, and with exit code 1.
    """
    from flows.doctor import examine
    from flows.environment import resolve_home

    problems = 0
    for finding in examine(resolve_home()):
        typer.echo(finding)
        problems += not finding.ok
    if problems:
        raise typer.Exit(1)


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr."""
    try:
        app(prog_name="conta")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last line of defence before a traceback
        sys.exit(_report(error))
    sys.exit(0)


def _report(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    from wsss_core.errors import ContaError

    if isinstance(error, ContaError):
        typer.echo(f"conta: {error}", err=True)
        return error.exit_code
    typer.echo(
        f"conta: {type(error).__name__}: {' '.join(str(error).split())}; this is a fault of ours, "
        f"please report it with {_keep_traceback(error)}",
        err=True,
    )
    return 1


def _keep_traceback(error: Exception) -> str:
    """Write the traceback where the user can find it; returns the place."""
    import traceback

    from flows.environment import resolve_home

    text = "".join(traceback.format_exception(error))
    path = resolve_home() / "fault.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{' '.join(sys.argv)}\n{text}\n")
    except OSError:
        typer.echo(text, err=True)
        return "the lines above"
    return str(path)


if __name__ == "__main__":
    main()
