"""The command line is a promise: this is all of it."""

import typer

from flows import cli

SURFACE = {
    "run": {
        "recipe": "RECIPE",
        "data": "--data",
        "rounds": "--rounds",
        "seed": "--seed",
        "settings": "--set",
        "until": "--until",
        "limit": "--limit",
        "dry_run": "--dry-run",
    },
    "resume": {"run": "[RUN]"},
    "compare": {"runs": "[RUN ...]", "as_json": "--json", "html": "--html"},
    "study": {"study": "STUDY", "data": "--data", "out": "--out/-o", "verify": "--verify"},
    "promote": {"model": "RUN[:ROUND]", "metric": "--metric"},
    "predict": {
        "photos": "PHOTOS",
        "model": "--model",
        "out": "--out/-o",
        "overlay": "--overlay",
    },
    "serve": {"model": "--model", "host": "--host", "port": "--port"},
    "score": {"masks": "MASKS", "truth": "TRUTH", "labels": "--labels", "as_json": "--json"},
    "export masks": {"model": "RUN[:ROUND]", "out": "--out/-o"},
    "export onnx": {"model": "RUN[:ROUND]", "out": "--out/-o"},
    "data check": {"folder": "DIR"},
    "data scenes": {
        "out": "OUT",
        "photos": "--photos",
        "size": "--size",
        "confounding": "--confounding",
        "seed": "--seed",
    },
    "store du": {},
    "store gc": {"dry_run": "--dry-run"},
    "ui": {},
    "deploy": {"recipes": "RECIPE ...", "data": "--data", "cron": "--cron"},
    "env": {},
    "doctor": {},
}


def list_verbs(command, name=""):
    """Each verb's parameters, by the words that call it."""
    if not hasattr(command, "commands"):
        return {name: {p.name: spell(p) for p in command.params if p.name != "help"}}
    verbs = {}
    for part, child in command.commands.items():
        verbs |= list_verbs(child, f"{name} {part}".strip())
    return verbs


def spell(parameter):
    """How a parameter is written on the command line."""
    if parameter.param_type_name == "argument":
        return parameter.metavar
    return "/".join(parameter.opts)


def test_surface__is_frozen():
    found = list_verbs(typer.main.get_command(cli.app))
    assert found == SURFACE, (
        "the command line changed. A setting belongs into the recipe (`--set a.b=value` reaches "
        "it); a new verb or path is added here and to the README and the changelog"
    )


def test_help__every_verb_and_option_explains_itself():
    def walk(command):
        assert command.help, command.name
        for parameter in command.params:
            assert parameter.name == "help" or parameter.help, (command.name, parameter.name)
        for child in getattr(command, "commands", {}).values():
            walk(child)
            assert len(child.get_short_help_str(200).split(". ")[0]) <= 60, child.name

    walk(typer.main.get_command(cli.app))


def test_until__names_the_stages_that_exist():
    from flows.runs import MAIN_STAGES

    named = cli.STAGES.replace(" or ", ", ").split(", ")
    assert named == list(MAIN_STAGES)
