"""What messages tell users to do exists and is accepted: options, their values, functions, commands and flags."""

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import fiftyone as fo
import open_clip
import pytest

import fiftyone_ecif
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings

ROOT = Path(fiftyone_ecif.__file__).parents[1]
TABLES = (InfluenceSettings, MisalignmentSettings, FitSettings, JobSettings)
COMPANY = {"trained": {"fit": False}}  # what an option goes with
GIVEN = re.compile(r"(?<![\w./{?&])([a-z_]+)=('[^'{}]*'|True|False|None|\d[\d.]*|\{\.\.\.\}|[a-z_]+\b)?")
CALLED = re.compile(r"\b([a-z]+_[a-z_]+)(?:\((?=[a-z_]+=)| (?:again )?with (?=[a-z_]+=))([a-z_]+)=")
VERBS = re.compile(
    r"\b(?:[Rr]aise|[Ll]ower) ([a-z_]+)(?: or ([a-z_]+))?|\b[Gg]ive ([a-z]+_[a-z_]+)\b|\b[Ll]eave ([a-z_]+) out"
)
SCOPES = re.compile(r"(?<![\w:=])(?:heads\+[a-z_]+|lora(?::[a-z\d]+)*|blocks:[a-z\d]+)(?![\w:\[])")
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")
COMMAND = re.compile(r"\bfiftyone-ecif ((?:[a-z]+ ?)+)")
PRONOUNS = ("it", "them", "they")


def messages():
    """``(file and line, text)`` of all texts of more than a word; what is filled in is ``{...}``."""
    found = []
    for path in [*ROOT.glob("fiftyone_ecif/**/*.py"), *ROOT.glob("operators/**/*.py")]:
        tree = ast.parse(path.read_text())
        nodes = list(ast.walk(tree))
        inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        inside |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        for node in nodes:
            text = said(node) if id(node) not in inside else ""
            if " " in text and not re.search(r"\(\?|\\b|^\s*[<{]", text):  # neither patterns nor markup
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return found


def said(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    return ""


@cache
def functions():
    """Ours, and those of FiftyOne and open_clip that messages name."""
    ours = {name: getattr(fiftyone_ecif, name) for name in fiftyone_ecif.__all__ if name[0].islower()}
    named = {"select_group_slices": fo.Dataset.select_group_slices, "create_model": open_clip.create_model}
    return {name: inspect.signature(function) for name, function in (ours | named).items()}


@cache
def arguments():
    """What users can give by name: options, and arguments of functions and benchmarks."""
    options = {name for table in TABLES for name in table.options()}
    return options.union({"data", "noise"}, *(signature.parameters for signature in functions().values()))


@cache
def commands():
    def walk(command, path):
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, name))

    return dict(walk(main, ()))


def problem(text):
    """What is wrong with the advice in a text, or None."""
    for name, value in GIVEN.findall(text):
        if name not in arguments():
            return f"there is no option {name}"
        if (wrong := refused(name, value)) is not None:
            return wrong
    for function, name in CALLED.findall(text):
        if function not in functions():
            return f"there is no function {function}"
        if name not in functions()[function].parameters:
            return f"{function} has no {name}"
    for names in VERBS.findall(text):
        for name in names:
            if name and name not in (*PRONOUNS, *arguments()):
                return f"there is no option {name}"
    for scope in SCOPES.findall(text):
        parse_scope(scope)
    known = {flag for command in commands().values() for option in command.params for flag in option.opts}
    for flag in FLAG.findall(text):
        if flag not in known:
            return f"there is no flag {flag}"
    for words in COMMAND.findall(text):
        path = tuple(words.split())
        if not any(path[:end] in commands() for end in range(1, len(path) + 1)):
            return f"there is no command {words}"
    return None


def refused(name, value):
    """Why no table of options takes a value that is written out, or None."""
    try:
        given = ast.literal_eval(value.replace("{...}", "filled in or not"))
    except (ValueError, SyntaxError):
        return None  # filled in, or a word of the sentence
    wrong = None
    for table in TABLES:
        if name in table.options():
            try:
                table(**{name: given}, **COMPANY.get(name, {}))
                return None
            except EcifError as error:
                wrong = str(error)
    return wrong


def test_what_is_advised_exists_and_is_accepted():
    found = messages()
    assert not [f"{place}: {wrong}: {text}" for place, text in found if (wrong := problem(text)) is not None]
    advised = {name for _, text in found for name, _ in GIVEN.findall(text)}
    assert {
        "overwrite",
        "fit",
        "skip_failures",
        "scope",
        "device",
        "keep_gradients",
        "trained",
        "spare_equal",
    } <= advised
    assert sum(bool(VERBS.search(text)) for _, text in found) > 5
    assert sum(bool(FLAG.search(text)) for _, text in found) > 3
    assert sum(bool(COMMAND.search(text)) for _, text in found) > 1


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("It is taken. Set overwrit=True", "no option overwrit"),
        ("It has no head. Use scope='heads+logit'", "scope='heads\\+logit'"),
        ("Run compute_influences again with overwrite=True", "no function compute_influences"),
        ("Call compute_influence(epochs=3) first", "compute_influence has no epochs"),
        ("It did not converge. Raise proximity or damping", "no option proximity"),
        ("Give label_fields", "no option label_fields"),
        ("It cannot be. Leave exactly out", "no option exactly"),
        ("Say which: --target-tags or --target-view", "no flag --target-tags"),
        ("Make room by fiftyone-ecif caches --free", "no command caches"),
        ("Use target_loss='retrieval'", "retrieval"),
        ("Use n_partitions=0", "at least 1"),
    ],
)
def test_wrong_advice_is_noticed(text, wrong):
    try:
        found = problem(text)
    except EcifError as error:
        found = str(error)
    assert found is not None
    assert re.search(wrong, found)
