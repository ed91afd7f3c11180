"""Readers and parsers on what nobody would write: an :class:`EcifError` or a right answer, nothing else.

``pytest tests/test_fuzz.py --hypothesis-profile long`` looks a hundred times longer.
"""

import io
import json
import math
import string

import fiftyone as fo
import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fiftyone_ecif import EcifError
from fiftyone_ecif.bench.misalignment.pairs import read_folder
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.influence.scope_choice import ScopeChoice, parse_scope
from fiftyone_ecif.influence.targets import fill_prompts
from fiftyone_ecif.models.checkpoint import load_adapters, load_preprocessing
from fiftyone_ecif.runs.influence import slice_names
from fiftyone_ecif.samples.export import _csv_cell
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.store.tables import Store

for name, examples in (("short", 100), ("long", 10_000)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name == "short",
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
settings.load_profile("short")

COLUMNS = {
    "key": np.array([b"%032d" % number for number in range(5)]),
    "features": np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32),
    "row": np.arange(5),
    "mistake": np.arange(5) % 2 == 0,
}


@pytest.fixture(scope="module")
def table():
    store = Store("fuzzed-store")
    table = store.table("rows")
    table.write("0", COLUMNS)
    yield table, (table.folder / "0.h5").read_bytes()
    store.delete()


def mutations(content):
    """Bytes that were changed here and there, cut, doubled, left out or overwritten by others."""
    places = st.integers(0, len(content) - 1)
    bits = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=8)
    pieces = st.tuples(places, st.integers(0, 64), st.binary(max_size=64))

    def flip(changes):
        changed = bytearray(content)
        for place, bit in changes:
            changed[place] ^= bit
        return bytes(changed)

    return st.one_of(
        bits.map(flip),
        places.map(lambda end: content[:end]),
        pieces.map(lambda cut: content[: cut[0]] + cut[2] + content[cut[0] + cut[1] :]),
        st.binary(max_size=256).map(lambda other: content[:8] + other),
    )


@given(data=st.data())
def test_a_mutated_part_is_refused_or_read_as_it_was(table, data):
    table, content = table
    (table.folder / "0.h5").write_bytes(data.draw(mutations(content)))
    try:
        found = table.read_all(*COLUMNS)
    except EcifError:
        return
    assert all(found[name].dtype == values.dtype and (found[name] == values).all() for name, values in COLUMNS.items())


def test_each_byte_of_a_part_matters_or_is_not_used(table):
    """Of every byte: the header's, the attributes', the data's."""
    table, content = table
    refused = 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        (table.folder / "0.h5").write_bytes(changed)
        try:
            found = table.read("0", *COLUMNS)
            assert all((found[name] == values).all() for name, values in COLUMNS.items())
        except EcifError:
            refused += 1
    assert refused > len(content) / 3 / 2


NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)
VALUES = st.sampled_from(["f4", "f8", "i8", "u1", "S3", "?", "f4,i4", "O"])


@given(
    columns=st.dictionaries(
        st.sampled_from(["key", "row", "x"]),
        st.tuples(VALUES, st.lists(st.integers(0, 6), max_size=3), st.booleans()),
        min_size=1,
    ),
    rows=st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(), st.lists(st.integers(0, 9), max_size=3)),
)
def test_a_made_up_part_is_refused_or_what_it_says(table, columns, rows):
    table, _ = table
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs["format"] = 1
        file.attrs["rows"] = rows
        for name, (kind, shape, checked) in columns.items():
            dtype = h5py.string_dtype() if kind == "O" else np.dtype(kind)
            file.create_dataset(
                name, shape, dtype, fletcher32=(checked and 0 not in shape and len(shape) > 0 and kind != "O") or None
            )
    (table.folder / "0.h5").write_bytes(image.getvalue())
    try:
        found = table.read("0", *columns)
    except EcifError:
        return
    assert all(len(values) == rows and values.dtype.kind in "biufS" for values in found.values())


@given(st.one_of(st.text(), st.from_regex(r"(heads|lora|blocks)[:+]?[0-9a-z:_+]*")))
@example("lora:" + "9" * 5000)
@example("blocks:" + "9" * 5000)
@example("a{99999999999999999999}")
@example("(" * 500)
@example("(?a" * 3)
@example("lora:٤")
def test_scopes(text):
    try:
        choice = parse_scope(text)
    except EcifError:
        return
    assert isinstance(choice, ScopeChoice)
    kinds = [
        choice.heads,
        choice.rank is not None,
        choice.rank is None and choice.blocks is not None,
        bool(choice.pattern),
    ]
    assert sum(kinds) == 1


@given(st.lists(st.text()), st.lists(st.text(), min_size=1))
@example(["{}{}"], ["{0}", "{x.__class__}"])
@example(["{} {0}"], ["cat"])
@example(["{}{"], ["cat"])
def test_templates(templates, classes):
    """A class is put in as it is, whatever braces it or the template holds: nothing is looked up."""
    try:
        InfluenceSettings(templates=templates)
    except EcifError:
        return
    expected = [template.replace("{}", name) for name in classes for template in templates]
    assert sorted(fill_prompts(classes, templates)) == sorted(expected)


@given(
    st.one_of(
        st.binary(max_size=300), st.text().map(lambda text: ("filepath,caption\n" + text).encode("utf-8", "replace"))
    )
)
@example(b"filepath,caption\n\0,x\n")
@example(b'filepath,caption\n"a' + b"x" * 200_000)
@example(b"filepath,caption\n" + b"a" * 5000 + b",x\n")
@example(b"filepath,caption,x\nimage.png,words,more,than,there,are,columns\n")
@example(b"filepath,caption\n~/image.png\n")
def test_tables_of_pairs(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-pairs"
    folder.mkdir(exist_ok=True)
    (folder / "image.png").touch()
    (folder / "pairs.csv").write_bytes(content)
    try:
        pairs = read_folder(folder, "fuzzed")
    except EcifError:
        return
    assert set(pairs.paths) == {str(folder / "image.png")}
    assert all(text.strip() for text in pairs.captions)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KNOWN = st.fixed_dictionaries(
    {}, optional={name: JSON for name in ("image_mean", "image_std", "image_interpolation", "image_resize_mode")}
)


@given(
    st.one_of(
        st.binary(),
        JSON.map(lambda value: json.dumps(value).encode()),
        KNOWN.map(lambda value: json.dumps(value).encode()),
    )
)
@example(b'{"image_mean": ' + b"9" * 5000 + b"}")
@example(b'{"image_mean": 1e400}')
def test_preprocessing(tmp_path_factory, content):
    weights = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    weights.touch()
    weights.with_name("fuzzed.pt.preprocessing.json").write_bytes(content)
    try:
        found = load_preprocessing(str(weights))
    except EcifError:
        return
    for name, value in found.items():
        if name in ("image_mean", "image_std"):
            assert all(math.isfinite(number) for number in (value if isinstance(value, list) else [value]))
        else:
            assert isinstance(value, str)


ADAPTERS = save({"A.w": torch.ones(2, 3), "B.w": torch.ones(4, 2)})


@given(st.one_of(st.binary(max_size=200), mutations(ADAPTERS)))
def test_adapters(tmp_path_factory, content):
    weights = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    weights.touch()
    weights.with_name("fuzzed.pt.adapters").write_bytes(content)
    try:
        found = load_adapters(str(weights))
    except EcifError:
        return
    assert all(a.ndim == b.ndim == 2 and len(a) == b.shape[1] for a, b in found.values())


@given(st.dictionaries(st.one_of(st.text(), st.integers()), st.none()))
def test_names_of_slices(target):
    try:
        names = slice_names(target)
    except EcifError:
        return
    assert all(f"ecif_influence_on_{name}".isidentifier() for name in names)


@given(
    st.one_of(
        st.text(), st.lists(st.text()), st.floats(), st.integers(), st.none(), st.booleans(), st.text("=+-@\t\r \uff1d")
    )
)
def test_cells_of_a_table(value):
    cell = _csv_cell(value)
    assert (
        not isinstance(cell, str) or cell.strip()[:1] not in tuple("=+-@\uff1d\uff0b\uff0d\uff20") or cell.strip() == ""
    )
    if isinstance(value, str):
        assert cell in (value, f"'{value}")


@pytest.fixture(scope="module")
def scored():
    dataset = fo.Dataset("fuzzed")
    dataset.add_samples([fo.Sample(f"/{n}.png", caption="x", ecif_influence=n - 5.0) for n in range(5)], progress=False)
    yield dataset
    dataset.delete()


@settings(max_examples=25)
@given(
    st.sampled_from(["--count", "--share", "--threshold"]),
    st.one_of(st.text("0123456789.eE+-naif_ ", max_size=12), st.integers().map(str), st.floats().map(str)),
)
@example("--count", "9" * 30)
@example("--count", "9" * 5000)
@example("--share", "1e-320")
def test_limits_on_the_command_line(scored, limit, value):
    scored.untag_samples("fuzzed")
    ran = CliRunner().invoke(main, ["tag", "fuzzed", f"{limit}={value}", "--tag", "fuzzed"])
    assert ran.exit_code in (0, 1, 2), ran.output
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    tagged = scored.count_sample_tags().get("fuzzed", 0)
    assert tagged <= 5
    if ran.exit_code == 0 and limit == "--count":
        assert tagged == min(int(value), 5)
