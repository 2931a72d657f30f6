from __future__ import annotations

import stat

import pytest

from medssl.errors import ConfigError, MachineError
from medssl.scans.identity import Salt


def test_salt_is_for_its_owner_only(tmp_path):
    path = tmp_path / "private" / "salt"
    Salt.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_same_salt_gives_same_keys(tmp_path):
    path = tmp_path / "private" / "salt"
    first, again = Salt.load_or_create(path), Salt.load_or_create(path)
    assert first.key("patient", "A-1") == again.key("patient", "A-1")


def test_another_salt_gives_other_keys(tmp_path):
    keys = {Salt.load_or_create(tmp_path / name / "salt").key("scan", "x") for name in "ab"}
    assert len(keys) == 2


def test_keys_of_two_kinds_differ():
    salt = Salt(bytes(32))
    assert len({salt.key(kind, "1") for kind in ("patient", "study", "series", "scan")}) == 4


def test_key_is_sixteen_hexadecimal_digits():
    key = Salt(bytes(32)).key("patient", "Müller^Jürgen")
    assert len(key) == 16
    int(key, 16)


def test_salt_is_not_shown():
    assert "41" not in repr(Salt(b"A" * 32))


def test_exposed_salt_is_refused(tmp_path):
    path = tmp_path / "private" / "salt"
    Salt.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(MachineError, match=r"read by other users \(mode 0640, wanted 0600\)"):
        Salt.load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_damaged_salt_is_refused(tmp_path, content):
    path = tmp_path / "salt"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(MachineError, match="does not hold 64 hexadecimal digits"):
        Salt.load_or_create(path)


def test_keys_of_public_data_are_the_same_on_every_machine(tmp_path):
    first, second = (Salt.load_or_create(tmp_path / n / "salt", "hippocampus") for n in "ab")
    assert first.key("patient", "1") == second.key("patient", "1")
    assert first.key("patient", "1") == "1e833938a4d76345"
    other = Salt.load_or_create(tmp_path / "c" / "salt", "others")
    assert other.key("patient", "1") != first.key("patient", "1")


def test_an_index_with_a_salt_of_its_own_gets_no_public_one(tmp_path):
    Salt.load_or_create(tmp_path / "salt")
    with pytest.raises(ConfigError, match="the index has a salt of its own already"):
        Salt.load_or_create(tmp_path / "salt", "hippocampus")
