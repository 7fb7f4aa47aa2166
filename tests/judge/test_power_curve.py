"""The power of all nodes together, by hand."""

from __future__ import annotations

from pathlib import Path

from llama2_lora.judge.power import read_power


def test_nodes_are_added_up_from_when_all_have_a_reading(tmp_path: Path) -> None:
    """Node 0 reads 100 at 0 s and 300 at 2 s, node 1 reads 10 at 1 s: 110 from then on, then 310."""
    folder = tmp_path / "power/run_1"
    folder.mkdir(parents=True)

    def line(time_ms: int, key: str, value: float | None = None) -> str:
        text = "null" if value is None else str(value)
        event = f'"namespace": "", "time_ms": {time_ms}, "event_type": "POINT_IN_TIME", "key": "{key}", "value": {text}'
        return f':::MLLOG {{{event}, "metadata": {{}}}}\n'

    start = line(0, "power_measurement_start")
    (folder / "node_0.txt").write_text(start + line(1, "power_reading", 100) + line(2000, "power_reading", 300))
    (folder / "node_1.txt").write_text(start + line(1000, "power_reading", 10))
    power = read_power(folder.iterdir())[str(tmp_path / "run_1")]
    assert power.curve == ((1000, 110), (2000, 310))
    assert power.nodes == 2
