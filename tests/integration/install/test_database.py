"""The set-up's care for mongod: only what is missing is brought."""

import subprocess

import pytest

from fiftyone_ecif.install import database


def program(path, code=0, stderr=""):
    path.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit {code}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    place = tmp_path / "site" / "fiftyone" / "db" / "bin" / "mongod"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(database, "_bundled", lambda: [place])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("FIFTYONE_DATABASE_URI")
    return place


@pytest.fixture
def installed(monkeypatch):
    calls = []
    monkeypatch.setattr(database, "_pip_install", lambda *what: calls.append(what))
    return calls


def test_the_database_in_use_starts():
    assert database.what_is_wrong(database.mongod()) is None


def test_a_mongod_that_works_is_left_alone(bundled, installed):
    program(bundled)
    before = bundled.read_bytes()
    database.ensure_mongod()
    assert installed == []
    assert bundled.read_bytes() == before


def test_a_mongod_on_the_path_is_enough(bundled, installed, tmp_path):
    program(tmp_path / "mongod")
    database.ensure_mongod()
    assert installed == []


def test_a_database_elsewhere_is_enough(bundled, installed, monkeypatch):
    monkeypatch.setenv("FIFTYONE_DATABASE_URI", "mongodb://elsewhere")
    database.ensure_mongod()
    assert installed == []


def test_a_missing_mongod_is_installed(bundled, monkeypatch, capsys):
    monkeypatch.setattr(database, "_pip_install", lambda *what: program(bundled))
    database.ensure_mongod()
    assert "came without mongod" in capsys.readouterr().out
    assert database.mongod() == bundled


def test_a_mongod_that_cannot_start_is_said(bundled, installed):
    program(bundled, code=1, stderr="no OpenSSL here")
    with pytest.raises(SystemExit, match="cannot start: no OpenSSL here"):
        database.ensure_mongod()


def test_a_missing_libcurl_is_brought(bundled, installed, monkeypatch):
    program(bundled, code=127, stderr="libcurl.so.4: cannot open shared object file")
    libraries = bundled.parents[3] / "pycurl.libs"
    libraries.mkdir()
    (libraries / "libcurl-1234.so.4.8.0").touch()
    ran, run = [], subprocess.run

    def patchelf(command, **options):
        if "--replace-needed" not in command:
            return run(command, **options)
        ran.append(command[1:-1])
        program(command[-1])

    monkeypatch.setattr(database.subprocess, "run", patchelf)
    database.ensure_mongod()
    assert installed == [("pycurl", "patchelf")]
    rpath = "$ORIGIN/../../../pycurl.libs"
    assert ran == [["--replace-needed", "libcurl.so.4", "libcurl-1234.so.4.8.0", "--set-rpath", rpath]]
    assert database.what_is_wrong(bundled) is None
