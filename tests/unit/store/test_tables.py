"""The store: whole parts or none, names that stay inside, damage that is said."""

import h5py
import numpy as np
import pytest

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import cache_folder
from fiftyone_ecif.store.tables import Store


@pytest.fixture
def store():
    store = Store("test-store")
    yield store
    store.delete()


def test_rows_come_back_in_the_order_of_the_parts(store):
    table = store.table("rows")
    table.write("1", {"x": np.arange(3, 5), "y": np.ones((2, 4))})
    table.write("0", {"x": np.arange(3), "y": np.zeros((3, 4))})
    found = table.read_all("x", "y")
    assert found["x"].tolist() == [0, 1, 2, 3, 4]
    assert found["y"].sum(1).tolist() == [0, 0, 0, 4, 4]


def test_parts_are_read_one_after_another(store):
    table = store.table("rows")
    assert list(table.read_each("x")) == []
    for part, count in enumerate((2, 0, 3)):
        table.write(str(part), {"x": np.full((count, 2), part), "y": np.ones(count)})
    found = [part["x"].tolist() for part in table.read_each("x")]
    assert found == [[[0, 0]] * 2, [], [[2, 2]] * 3]
    path = table.folder / "2.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EcifError, match=r"2\.h5 is damaged"):
        list(table.read_each("x"))


def test_a_write_that_fails_leaves_no_part(store):
    table = store.table("rows")
    with pytest.raises(TypeError):
        table.write("0", {"x": np.arange(3), "y": np.array([object()])})
    assert table.parts() == []
    assert not table.folder.exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "format", "column", "length"])
def test_damage_is_said(store, damage):
    table = store.table("rows")
    table.write("0", {"x": np.arange(1000)})
    path = table.folder / "0.h5"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-100] ^= 0xFF
        path.write_bytes(content)
    else:
        with h5py.File(path, "a") as file:
            if damage == "format":
                file.attrs["format"] = 99
            elif damage == "length":
                file.attrs["rows"] = 7
            else:
                del file["x"]
    with pytest.raises(EcifError, match=r"Delete .* and run again"):
        table.read("0", "x")


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "", "A"])
def test_no_name_leads_out_of_the_cache(name):
    with pytest.raises(EcifError, match="not a name"):
        Store(name)


def test_a_store_without_a_name_is_not_the_whole_cache():
    with pytest.raises(EcifError, match="not a name"):
        Store()


def test_deleting_takes_empty_folders_above_along(store):
    inner, other = store.inside("a").inside("b"), store.inside("c")
    inner.table("rows").write("0", {"x": np.arange(2)})
    other.table("rows").write("0", {"x": np.arange(2)})
    inner.delete()
    assert [path.name for path in store.folder.iterdir()] == ["c"]
    other.delete()
    assert not store.folder.exists()
    assert cache_folder().exists()
