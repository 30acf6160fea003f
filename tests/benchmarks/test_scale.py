"""The page of the driver's costs: cost for each slice, and how it grows."""

from benchmarks import scale_driver


def costs(files: int, seconds: float) -> dict:
    steps = {step: {"cpu": seconds, "seconds": 2 * seconds} for step in scale_driver.STEPS}
    return {"files": files, "peak_bytes": 2**30, **steps}


def test_a_cost_that_grows_with_the_files_has_exponent_one_and_with_their_square_two():
    about = {"date": "today", "commit": "abc", "cpu": "x", "cores": 2, "versions": {"ray": "2"}}
    found = [costs(1000, 1.0), costs(10_000, 10.0)]
    found[1]["plan"]["cpu"] = 100.0
    lines = scale_driver.section(found, about)
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert rows["publish: listing, manifest"].endswith("| 1.00 (1.000) | 10.00 (1.000) | 1.00 |")
    assert rows["plan of slices from footers"].endswith("| 1.00 (1.000) | 100.00 (10.000) | 2.00 |")
    assert rows["peak memory"] == "| peak memory | 1.00 GiB | 1.00 GiB | |"
