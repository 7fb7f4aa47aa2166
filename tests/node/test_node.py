"""Node checks: what is read from nvidia-smi, ibstat and the node itself (probe.py), and how it is judged (verdict.py).

The outputs of nvidia-smi and ibstat are written after the tools' own formats, cut down to what matters and some neighbours.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.training_runs import make_data
from llama2_lora.findings import Finding, at_least, exit_status
from llama2_lora.node import probe, verdict

GPU = """
<gpu id="00000000:{bus:02X}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <mig_mode><current_mig>Disabled</current_mig><pending_mig>Disabled</pending_mig></mig_mode>
  <fb_memory_usage><total>81559 MiB</total><used>4 MiB</used><free>81004 MiB</free></fb_memory_usage>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_sw_power_cap>Not Active</clocks_event_reason_sw_power_cap>
    <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
    <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
  </clocks_event_reasons>
  <ecc_errors>
    <volatile>
      <sram_correctable>0</sram_correctable>
      <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
      <dram_correctable>3</dram_correctable>
      <dram_uncorrectable>0</dram_uncorrectable>
    </volatile>
    <aggregate><dram_uncorrectable>7</dram_uncorrectable></aggregate>
  </ecc_errors>
  <remapped_rows>
    <remapped_row_corr>0</remapped_row_corr>
    <remapped_row_pending>No</remapped_row_pending>
    <remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
  <temperature><gpu_temp>29 C</gpu_temp><gpu_temp_max_threshold>87 C</gpu_temp_max_threshold></temperature>
  <applications_clocks><graphics_clock>1980 MHz</graphics_clock><mem_clock>2619 MHz</mem_clock></applications_clocks>
  <max_clocks><graphics_clock>1980 MHz</graphics_clock><sm_clock>1980 MHz</sm_clock></max_clocks>
  <fabric><state>Completed</state><status>Success</status><cliqueId>0</cliqueId></fabric>
</gpu>
"""


def nvidia_smi(gpus: int = 8) -> str:
    devices = "".join(GPU.format(bus=16 * i + 11) for i in range(gpus))
    head = '<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">'
    versions = "<driver_version>570.133.20</driver_version><cuda_version>12.8</cuda_version>"
    return f"{head}<nvidia_smi_log>{versions}{devices}</nvidia_smi_log>"


def nvlink(gpus: int = 8, links: int = 18) -> str:
    rows = "".join(f"\t Link {i}: 26.562 GB/s\n" for i in range(links))
    return "".join(f"GPU {g}: NVIDIA H100 80GB HBM3 (UUID: GPU-{g:08x}-0000)\n{rows}" for g in range(gpus))


def ibstat(ports: int = 2) -> str:
    text = """CA 'mlx5_{i}'
\tCA type: MT4129
\tNumber of ports: 1
\tFirmware version: 28.39.1002
\tPort 1:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 400
\t\tBase lid: {i}
\t\tLink layer: InfiniBand
"""
    ethernet = text.format(i=9).replace("State: Active", "State: Down").replace("InfiniBand", "Ethernet")
    return "".join(text.format(i=i) for i in range(ports)) + ethernet


def node(number: int = 0, **changes: object) -> dict:
    """A healthy node's probe, as JSON brings it back."""
    seen = {
        "node": number,
        "host": f"node{number + 1}",
        "gpu": probe.parse_nvidia_smi(nvidia_smi()),
        "cuda": {"version": "12.9.1", "compat": False},
        "nvlink": probe.parse_nvlink(nvlink()),
        "infiniband": probe.parse_ibstat(ibstat()),
        "software": {"torch": "2.9.0"},
        "shared_memory_gib": 900.0,
        "results_gib": 4000.0,
        "results_writable": True,
        "data": {"bytes": {"train.npy": 100}, "manifest": {"train.npy": 100}},
        "checkpoint": {"files": 10, "bytes": 2**37},
        "clock": {"offset_seconds": 0.002},
    }
    return json.loads(json.dumps(seen | changes))


def judge(*nodes: dict) -> list[Finding]:
    return verdict.judge(nodes, len(nodes), 8, "gpu", "H100")


def bad(*nodes: dict) -> list[str]:
    return [f"{f.where} {f.code}: {f.text}" for f in at_least(judge(*nodes), "error")]


def test_healthy_nodes_pass_every_check():
    findings = judge(node(0), node(1))
    assert {f.level for f in findings} == {"ok"}
    assert exit_status(findings, verdict.stops_at("fail")) == 0


@pytest.mark.parametrize(
    ("pattern", "replacement", "problem"),
    [
        ("81559 MiB", "40960 MiB", "GPU 0: NVIDIA H100 80GB HBM3 has 40 GiB, H100 has 80: is ACCELERATOR right?"),
        (r"<used>4 MiB", "<used>30720 MiB", "GPU 0: 30.0 GiB are in use before the job starts"),
        ("29 C", "91 C", "GPU 0: 91 C before any load"),
        (r"(hw_thermal_slowdown)>Not Active", r"\1>Active", "GPU 0: slowed down by hw_thermal_slowdown"),
        (r"(<graphics_clock>)1980", r"\g<1>1200", "GPU 0: application clock 1200 MHz of 1980"),
        (r"(<dram_uncorrectable>)0", r"\g<1>2", "GPU 0: 2 uncorrectable ECC errors"),
        (r"(secded>)0", r"\g<1>1", "GPU 0: 1 uncorrectable ECC errors"),
        ("(row_pending>)No", r"\1Yes", "GPU 0: a memory row waits for remapping"),
        ("(current_mig>)Disabled", r"\1Enabled", "GPU 0: MIG is on"),
        ("(<state>)Completed", r"\1In Progress", "GPU 0: NVSwitch fabric state In Progress"),
        (r"570\.133\.20", "470.82.01", "driver: driver 470.82.01, at least 535 needed"),
    ],
)
def test_each_gpu_problem_is_found(pattern, replacement, problem):
    text = re.sub(pattern, replacement, nvidia_smi(), count=1)
    assert text != nvidia_smi()
    found = bad(node(gpu=probe.parse_nvidia_smi(text)))
    assert len(found) == 1
    assert problem in found[0]


def test_a_driver_that_is_older_than_the_images_cuda(tmp_path):
    """nemo:25.11 has CUDA 13, sites run driver 570: the way out is named; with the compat package it may well work."""
    (tmp_path / "version.json").write_text('{"cuda": {"version": "13.0.1"}}')
    (problem,) = bad(node(cuda=probe.cuda_toolkit(tmp_path)))
    assert "driver 570.133.20 knows CUDA 12.8, the image has 13.0.1: install driver 580, or" in problem
    (tmp_path / "compat/lib").mkdir(parents=True)
    (tmp_path / "compat/lib/libcuda.so.1").touch()
    found = node(cuda=probe.cuda_toolkit(tmp_path))
    assert bad(found) == []
    assert any("put /usr/local/cuda/compat/lib first" in f.text for f in judge(found) if f.level == "unknown")
    assert bad(node(cuda=probe.cuda_toolkit(tmp_path / "nowhere"))) == []


def test_throttle_reasons_of_drivers_before_535():
    text = (
        nvidia_smi(1)
        .replace("clocks_event_reason", "clocks_throttle_reason")
        .replace("hw_slowdown>Not Active", "hw_slowdown>Active")
    )
    assert probe.parse_nvidia_smi(text)["gpus"][0]["throttles"] == ["hw_slowdown"]


def test_a_lost_gpu():
    assert bad(node(gpu=probe.parse_nvidia_smi(nvidia_smi(7)))) == ["node1 gpus: 7 of 8 GPUs are visible"]


def test_links():
    one_down = nvlink().replace("Link 3: 26.562 GB/s", "Link 3: <inactive>", 1)
    assert "GPU 0: links 3 (0 GB/s) are slower than the usual 26.562 GB/s" in bad(node(nvlink=probe.parse_nvlink(one_down)))[0]
    assert "GPU 7 has 12 links of 18" in bad(node(nvlink=probe.parse_nvlink(nvlink(links=12))))[0]
    all_down = re.sub(r"26\.562 GB/s", "<inactive>", nvlink())
    assert "most links are inactive" in bad(node(nvlink=probe.parse_nvlink(all_down)))[0]


def tray(number: int, uuid: str, clique: int = 7) -> dict:
    """A tray of four GPUs in an NVL72 rack."""
    fabric = f"<cliqueId>{clique}</cliqueId><clusterUuid>{uuid}</clusterUuid>"
    text = nvidia_smi(4).replace("<cliqueId>0</cliqueId>", fabric)
    return node(number, gpu=probe.parse_nvidia_smi(text), nvlink=probe.parse_nvlink(nvlink(4)))


def racks(*trays: dict, group: int) -> list[tuple[str, str]]:
    found = verdict.judge(trays, len(trays), 4, "gpu", "GB200", group)
    return [(f.level, f.text) for f in found if f.code == "racks"]


A, B, NONE = (
    "4b6e1a5c-0000-4000-8000-00000000000a",
    "4b6e1a5c-0000-4000-8000-00000000000b",
    "00000000-0000-0000-0000-000000000000",
)


def test_a_context_parallel_group_lies_in_one_rack():
    """Two trays a group, as CP8 on GB200: groups may lie in different racks, but none in two."""
    ((level, text),) = racks(tray(0, A), tray(1, A), tray(2, B), tray(3, B), group=8)
    assert (level, text) == ("ok", "every group of 8 ranks lies in one NVLink domain, 2 in all")
    ((level, text),) = racks(tray(0, A), tray(1, A), tray(2, A), tray(3, B), group=8)
    assert level == "error"
    assert "have no common NVLink domain: node3 and node4; sbatch --segment=N" in text
    ((level, _),) = racks(tray(0, A, clique=1), tray(1, A, clique=2), group=8)
    assert level == "error", "a rack may be divided"


def test_racks_are_not_judged_where_a_node_holds_its_groups_or_reports_no_rack():
    assert racks(tray(0, A), tray(1, B), group=4) == []
    ((level, text),) = racks(tray(0, A), tray(1, NONE), group=8)
    assert (level, text) == ("unknown", "TP * CP = 8 ranks span 2 nodes; a node reports no NVLink domain")
    ((level, _),) = racks(tray(0, A), tray(1, A) | {"gpu": None}, group=8)
    assert level == "unknown"


def test_infiniband_ports_matter_on_more_than_one_node():
    down = probe.parse_ibstat(ibstat().replace("State: Active", "State: Down", 1))
    assert bad(node(infiniband=down)) == []
    found = bad(node(0, infiniband=down), node(1))
    assert "node1 infiniband: mlx5_0/1 is Down/LinkUp" in found
    assert "job same InfiniBand: " in " ".join(found)


def test_what_a_site_lacks_is_not_checked():
    findings = judge(node(gpu=None, nvlink=None, infiniband=None, shared_memory_gib=None))
    unknown = {f.code for f in findings if f.level == "unknown"}
    assert unknown == {"gpus", "nvlink", "infiniband", "shared memory"}
    assert exit_status(findings, verdict.stops_at("fail")) == 0


@pytest.mark.parametrize(
    "text", [None, "", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver", "<a><b></a>"]
)
def test_output_that_is_not_understood_is_none(text):
    assert probe.parse_nvidia_smi(text) is None
    assert probe.parse_nvlink(text) is None
    assert probe.parse_ibstat(text) is None


@pytest.mark.parametrize(
    ("changes", "problem", "fatal"),
    [
        (
            {"shared_memory_gib": 0.06},
            "node1 shared memory: 0.1 GiB free in /dev/shm (docker: --ipc=host), at least 1 needed",
            False,
        ),
        ({"results_gib": 0.0}, "node1 disk: 0.0 GiB free under LOGDIR, at least 1 needed", False),
        ({"clock": {"offset_seconds": -2.5}}, "node1 clock: the clock is -2.500 s from node 0, at most 1 allowed", False),
        ({"clock": {"error": "connecting to node 0 at a:1: timed out"}}, "node1 network: connecting to node 0 at a:1", False),
        ({"results_writable": False}, "node1 results: LOGDIR cannot be written to", True),
        ({"data": {"error": "[Errno 2] No such file"}}, "is DATADIR the folder", True),
        ({"data": {"bytes": {"train.npy": 1}, "manifest": {"train.npy": 2}}}, "train.npy has 1 bytes, manifest says 2", True),
        ({"checkpoint": {"error": "/ckpt: has no context/model.yaml"}}, "is MODEL the folder of a NeMo checkpoint?", True),
    ],
)
def test_host_and_file_problems(changes, problem, fatal):
    findings = judge(node(**changes))
    assert problem in " ".join(bad(node(**changes)))
    assert [exit_status(findings, verdict.stops_at(mode)) for mode in ("fail", "warn", "off")] == [1, int(fatal), int(fatal)]


def test_nodes_that_differ():
    found = bad(node(0), node(1), node(2, checkpoint={"files": 9, "bytes": 1}, software={"torch": "2.8.0"}))
    assert any(text.startswith("job same checkpoint: ") and "node3" in text for text in found)
    assert any(text.startswith("job same software: most: torch 2.9.0; but node3: torch 2.8.0") for text in found)


def test_a_node_that_did_not_answer_is_fatal():
    findings = verdict.judge([node(0)], 2, 8, "gpu", "H100")
    assert "1 of 2 nodes answered" in findings[0].text
    assert exit_status(findings, verdict.stops_at("off")) == 1


@pytest.mark.parametrize(
    ("measured", "nodes", "accelerator", "expected"),
    [
        (420, 1, "H100", "ok"),
        (120, 1, "H100", "error"),
        (240, 2, "H100", "ok"),
        (None, 2, "H100", "error"),
        (9, 2, "MI300X", "unknown"),
    ],
)
def test_allreduce_floor(measured, nodes, accelerator, expected):
    assert verdict.judge_allreduce(measured, nodes, accelerator).level == expected


def test_clocks_of_two_processes():
    with socket.create_server(("127.0.0.1", 0)) as free:
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    first: list[dict] = []
    server = threading.Thread(target=lambda: first.append(probe.measure_clock(0, 2, rendezvous, 20)))
    server.start()
    assert abs(probe.measure_clock(1, 2, rendezvous, 20)["offset_seconds"]) < 0.5
    server.join()
    assert first == [{"offset_seconds": 0.0}]
    assert "connecting to node 0" in probe.measure_clock(1, 2, rendezvous, 0.3)["error"]


def test_the_command_on_this_machine(tmp_path: Path):
    pytest.importorskip("rich")
    make_data(tmp_path)
    for name in ("context/model.yaml", "weights/metadata.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    script = [sys.executable, ROOT / "scripts/health.py"]
    folders = [f"--{name}={tmp_path}" for name in ("data", "checkpoint", "results")]
    done = subprocess.run([*script, "probe", "--platform=cpu", *folders], capture_output=True, text=True, check=True)
    probes = tmp_path / "probes.jsonl"
    probes.write_text("a banner of the site\n" + done.stdout)
    good = subprocess.run([*script, "judge", probes, "--platform=cpu", "--gpus=2"], capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "same software" in good.stdout
    missing = subprocess.run(
        [*script, "judge", probes, "--platform=cpu", "--gpus=2", "--nodes=2"], capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert "1 of 2 nodes answered the probe" in missing.stdout
