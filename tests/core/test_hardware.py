"""Hardware profiles: every number has a source, is positive, and a wrong file is told line by line."""

from pathlib import Path

import pytest

from composeformer.costs import hardware
from composeformer.errors import InputError, SpecError

SHIPPED = ("a100", "b200", "h100", "h200", "h800", "mi300x")


def test_six_devices_are_shipped() -> None:
    assert tuple(hardware.shipped()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_of_a_shipped_profile_has_a_source(name: str) -> None:
    found = hardware.load(name)
    assert found.name == name
    for told, figure in found.figures().items():
        assert figure.source, told
        assert figure.value > 0, told
        # One that was recalled says so, and one that says so was recalled.
        assert figure.read != ("recalled" in figure.source), told


@pytest.mark.parametrize("name", SHIPPED)
def test_peaks_are_dense_and_halve_with_twice_the_bits(name: str) -> None:
    found = hardware.load(name)
    half = found.peak("bfloat16").value
    assert found.peak("float16").value == pytest.approx(half, rel=2e-4)
    if "float8_e4m3fn" in found.peaks:
        assert found.peak("float8_e4m3fn").value == pytest.approx(2 * half, rel=2e-4)


def test_a_peak_that_there_is_not_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        InputError, match=r"cost.peak = float8: hardware a100 has no peak of it, but of bfloat16"
    ):
        hardware.load("a100").peak("float8")


def test_a_name_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"hardware h80: must be a path or one of .*; did you mean 'h800'"):
        hardware.load("h80")


def test_every_problem_of_a_profile_is_told_at_once(tmp_path: Path) -> None:
    good = (Path(hardware.__file__).parents[1] / "hardware" / "h100.toml").read_text()
    bad = good.replace("memory = { value = 8e10", "memory = { value = 0.0").replace(
        "[peaks]", "[peaks]\nbf16 = 1"
    )
    bad = bad.replace("year = 2022", "year = 1").replace("power = {", "powr = {")
    file = tmp_path / "mine.toml"
    file.write_text(bad)
    with pytest.raises(SpecError) as refused:
        hardware.load(file)
    told = str(refused.value)
    for part in (
        "year = 1: must be >= 1990",
        "powr: unknown key",
        "did you mean 'power'",
        "power: is required",
        "memory.value = 0.0: must be > 0",
        "peaks.bf16",
    ):
        assert part in told, part
    assert f"{file}:" in told


@pytest.mark.parametrize(
    ("value", "told"), [("1e-300", "must be >= 1"), ("1e300", "must be <= 1e+30"), ("0", "must be > 0")]
)
def test_a_number_of_no_device_is_refused(tmp_path: Path, value: str, told: str) -> None:
    good = (Path(hardware.__file__).parents[1] / "hardware" / "h100.toml").read_text()
    path = tmp_path / "odd.toml"
    path.write_text(good.replace("value = 9.895e14", f"value = {value}"))
    with pytest.raises(SpecError) as refused:
        hardware.load(path)
    (line,) = refused.value.lines
    assert "peaks.bfloat16.value" in line
    assert told in line
