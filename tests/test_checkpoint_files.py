"""Damage of every kind is found, and a sound file is called sound."""

import hashlib
import json

import pytest

from studio.checkpoint_files import glance, manifest_path, verify


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step_20.pth"
    path.write_bytes(b"weights" * 1000)
    written = {"size_bytes": 7000, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest_path(path).write_text(json.dumps(written))
    return path


def test_a_sound_file_is_sound(checkpoint):
    seen = []
    assert verify(checkpoint, seen.append) == ""
    assert seen[-1] == 7000


def test_a_flipped_bit_is_found_by_reading_only(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[3000] ^= 1
    checkpoint.write_bytes(content)
    assert glance(checkpoint) == ""
    assert "sha256" in verify(checkpoint)


def test_a_short_file_is_found_at_a_glance(checkpoint):
    checkpoint.write_bytes(b"weights")
    assert "7 bytes" in glance(checkpoint)


def test_missing_file_missing_manifest_and_broken_manifest_are_told_apart(checkpoint):
    manifest_path(checkpoint).write_text("[1]")
    assert "lacks" in verify(checkpoint)
    manifest_path(checkpoint).write_text("{")
    assert "cannot be read" in verify(checkpoint)
    manifest_path(checkpoint).unlink()
    assert "no manifest" in verify(checkpoint)
    checkpoint.unlink()
    assert "gone" in verify(checkpoint)
