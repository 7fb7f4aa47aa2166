"""Is every node of the job fit to train on? Judges what health.py's probes said on all nodes.

`judge()` returns one Finding per node and check, then one per comparison of the nodes. What a node could not say is
`unknown`. Files that are missing or differ are `fatal`: without them there is no run, whatever HEALTH says. All thresholds
are in `LIMITS` and `LINKS`; memory is the part's own (gpus.py).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama2_lora.findings import Finding
from llama2_lora.gpus import ACCELERATORS
from llama2_lora.node.probe import GIB

JOB = "job"  # where a finding is about all nodes together


@dataclass(frozen=True)
class Limits:
    """What every node must keep, whatever its GPUs."""

    driver_major: int = 535  # oldest data-centre branch from which CUDA 13 images run through forward compatibility
    memory_share: float = 0.98  # of the part's memory: less is another part
    used_gib: float = 2.0  # more before the job starts means somebody else's process
    temperature_celsius: int = 80  # idle GPUs are far below
    shared_memory_gib: float = 1.0  # docker's default of 64 MiB makes NCCL and data workers die with a bus error
    results_gib: float = 1.0  # logs and one adapter
    clock_skew_seconds: float = 1.0  # events of one log would be out of order


@dataclass(frozen=True)
class Links:
    """What links a GPU model must show. All-reduce bus bandwidth in GB/s, on one node and on more: floors that a wrong
    interface or a dead link misses, well below healthy systems."""

    nvlinks: int
    allreduce_one_node: float
    allreduce_many_nodes: float


LIMITS = Limits()
CUDA_13_DRIVER = 580  # oldest branch that runs CUDA 13 by itself
LINKS = {
    "H100": Links(18, 300, 200),
    "H200": Links(18, 300, 200),
    "B200": Links(18, 500, 200),
    "B300": Links(18, 500, 200),
    "GB200": Links(18, 500, 400),  # 72 GPUs share one NVLink domain
    "GB300": Links(18, 500, 400),
}


def judge(
    probes: Sequence[dict[str, Any]], nodes: int, gpus: int, platform: str, accelerator: str, group: int = 1
) -> list[Finding]:
    """One finding per node and check, then what only a comparison of the nodes shows. `group`: consecutive ranks that exchange
    keys and values, TP * CP."""
    findings = []
    if len(probes) != nodes:
        findings.append(Finding("fatal", "nodes", f"{len(probes)} of {nodes} nodes answered the probe", JOB))
    for seen in probes:
        checks = [*_file_checks(seen), *_host_checks(seen)]
        if platform == "gpu":
            checks += [*_gpu_checks(seen, gpus, accelerator), *_link_checks(seen, nodes, LINKS.get(accelerator))]
        findings += [replace(check, where=seen["host"]) for check in checks]
    together = [*_comparisons(probes, platform), *_racks(probes, gpus, group)]
    return findings + [replace(check, where=JOB) for check in together]


def _file_checks(seen: dict[str, Any]) -> Iterator[Finding]:
    data, checkpoint = seen["data"], seen["checkpoint"]
    if "error" in data:
        yield Finding("fatal", "data", f"{data['error']}; is DATADIR the folder that download_dataset.py wrote?")
    elif data["manifest"] is None:
        yield Finding("unknown", "data", "no manifest.json beside the files: run download_dataset.py --check once")
    else:
        pairs = [(name, data["bytes"].get(name), size) for name, size in data["manifest"].items()]
        wrong = [f"{name} has {found} bytes, manifest says {size}" for name, found, size in pairs if found != size]
        yield Finding("fatal" if wrong else "ok", "data", "; ".join(wrong) or "sizes, rows and hashes agree with the manifest")
    if "error" in checkpoint:
        yield Finding("fatal", "checkpoint", f"{checkpoint['error']}; is MODEL the folder of a NeMo checkpoint?")
    else:
        yield Finding("ok", "checkpoint", f"{checkpoint['files']} files, {checkpoint['bytes'] / GIB:.2f} GiB")
    if seen["results_writable"]:
        yield Finding("ok", "results", "LOGDIR can be written to")
    else:
        yield Finding("fatal", "results", "LOGDIR cannot be written to by this user")


def _host_checks(seen: dict[str, Any]) -> Iterator[Finding]:
    memory, disk = seen["shared_memory_gib"], seen["results_gib"]
    yield _at_least("shared memory", memory, LIMITS.shared_memory_gib, "GiB free in /dev/shm (docker: --ipc=host)")
    yield _at_least("disk", disk, LIMITS.results_gib, "GiB free under LOGDIR")
    if "error" in seen["clock"]:
        why = "a firewall, or names that resolve to an interface that the nodes do not share?"
        yield Finding("error", "network", f"{seen['clock']['error']}; {why}")
    else:
        offset = seen["clock"]["offset_seconds"]
        text = f"the clock is {offset:+.3f} s from node 0, at most {LIMITS.clock_skew_seconds:g} allowed"
        yield _judged("clock", abs(offset) <= LIMITS.clock_skew_seconds, text)


def _at_least(check: str, value: float | None, limit: float, what: str) -> Finding:
    if value is None:
        return Finding("unknown", check, what)
    return _judged(check, value >= limit, f"{value:.1f} {what}, at least {limit:g} needed")


def _judged(check: str, good: bool, text: str) -> Finding:
    return Finding("ok" if good else "error", check, text)


def _gpu_checks(seen: dict[str, Any], gpus: int, accelerator: str) -> Iterator[Finding]:
    if seen["gpu"] is None:
        yield Finding("unknown", "gpus", "nvidia-smi is absent or failed")
        return
    devices = seen["gpu"]["gpus"]
    yield _judged("gpus", len(devices) == gpus, f"{len(devices)} of {gpus} GPUs are visible")
    driver = seen["gpu"]["driver"]
    old = not driver.split(".")[0].isdigit() or int(driver.split(".")[0]) < LIMITS.driver_major
    yield _judged("driver", not old, f"driver {driver}, at least {LIMITS.driver_major} needed")
    yield from _cuda_checks(driver, seen["gpu"]["cuda"], seen["cuda"])
    problems = [f"GPU {i}: {problem}" for i, device in enumerate(devices) for problem in _device_problems(device, accelerator)]
    yield _judged("gpu state", not problems, "; ".join(problems) or "memory, clocks, ECC, MIG and fabric as expected")
    optional = {"application_mhz", "nvlink_domain"}  # newer drivers have no application clocks, DGX systems no such domain
    if unread := sorted({key for device in devices for key, value in device.items() if value is None} - optional):
        yield Finding("unknown", "gpu state", f"this driver does not report {', '.join(unread)}")


def _cuda_checks(driver: str, known: str, toolkit: dict[str, Any]) -> Iterator[Finding]:
    """A driver before 580 knows CUDA 12 alone; data-centre GPUs run CUDA 13 on it through the image's compat package."""
    version = toolkit["version"]
    if not version or not known or int(known.split(".")[0]) >= int(version.split(".")[0]):
        return
    text = f"driver {driver} knows CUDA {known}, the image has {version}"
    if toolkit["compat"]:
        cure = "if CUDA calls the driver insufficient, put /usr/local/cuda/compat/lib first in LD_LIBRARY_PATH"
        yield Finding("unknown", "cuda", f"{text} and a compat package: {cure}")
    else:
        cure = f"install driver {CUDA_13_DRIVER}, or NVIDIA's cuda-compat package in the image"
        yield Finding("error", "cuda", f"{text}: {cure}")


def _device_problems(device: dict[str, Any], accelerator: str) -> Iterator[str]:
    memory, used = device["memory_gib"], device["used_gib"]
    part = ACCELERATORS.get(accelerator)
    if part and memory and memory < LIMITS.memory_share * part.memory_bytes / GIB:
        yield f"{device['name']} has {memory:.0f} GiB, {part.name} has {part.memory_bytes / GIB:.0f}: is ACCELERATOR right?"
    if used and used > LIMITS.used_gib:
        yield f"{used:.1f} GiB are in use before the job starts: another job or a left-over process"
    if device["temperature"] and device["temperature"] > LIMITS.temperature_celsius:
        yield f"{device['temperature']:.0f} C before any load"
    if device["throttles"]:
        yield f"slowed down by {', '.join(device['throttles'])}"
    clock, highest = device["application_mhz"], device["max_sm_mhz"]
    if clock and highest and clock < 0.9 * highest:
        yield f"application clock {clock:.0f} MHz of {highest:.0f}: reset it with nvidia-smi -rac"
    if device["ecc_uncorrectable"]:
        yield f"{device['ecc_uncorrectable']:.0f} uncorrectable ECC errors since the driver's start: reset or replace it"
    if device["remap_pending"]:
        yield "a memory row waits for remapping or could not be remapped: reset or replace it"
    if device["mig"]:
        yield "MIG is on: switch it off with nvidia-smi -mig 0"
    state, status = device["fabric"]
    if state not in ("N/A", "Not Supported") and (state, status) != ("Completed", "Success"):
        yield f"NVSwitch fabric state {state}, status {status}: is nvidia-fabricmanager running?"


def _link_checks(seen: dict[str, Any], nodes: int, expected: Links | None) -> Iterator[Finding]:
    if seen["nvlink"] is None:
        yield Finding("unknown", "nvlink", "nvidia-smi nvlink --status reports no link")
    else:
        usual = statistics.mode([speed for links in seen["nvlink"] for speed in links] or [0.0])
        problems = [] if usual else ["most links are inactive"]
        for gpu, links in enumerate(seen["nvlink"]):
            slow = [f"{i} ({speed:g} GB/s)" for i, speed in enumerate(links) if speed < usual]
            if slow:
                problems.append(f"GPU {gpu}: links {', '.join(slow)} are slower than the usual {usual:g} GB/s")
            if expected and len(links) < expected.nvlinks:
                problems.append(f"GPU {gpu} has {len(links)} links of {expected.nvlinks}")
        yield _judged("nvlink", not problems, "; ".join(problems) or f"all links at {usual:g} GB/s")
    if seen["infiniband"] is None:
        yield Finding("unknown", "infiniband", "ibstat is absent or lists no port")
        return
    ports = [p for p in seen["infiniband"] if p.get("link layer") == "InfiniBand" and p.get("physical state") != "Disabled"]
    down = [f"{p['name']} is {p.get('state')}/{p.get('physical state')}" for p in ports if not _active(p)]
    if not ports:
        yield Finding("unknown", "infiniband", "no InfiniBand port in use (Ethernet is not judged)")
    else:
        yield _judged("infiniband", not down or nodes == 1, "; ".join(down) or f"{len(ports)} ports active")


def _comparisons(probes: Sequence[dict[str, Any]], platform: str) -> Iterator[Finding]:
    """What must be the same on every node. Files that differ are fatal: the nodes would train on different data."""
    facts: dict[str, Any] = {"data": lambda s: s["data"].get("bytes"), "checkpoint": lambda s: s["checkpoint"]}
    facts["software"] = lambda s: ", ".join(f"{name} {version}" for name, version in s["software"].items())
    if platform == "gpu":
        facts["driver"] = lambda s: s["gpu"] and s["gpu"]["driver"]
        facts["GPUs"] = lambda s: s["gpu"] and sorted({d["name"] for d in s["gpu"]["gpus"]})
        facts["InfiniBand"] = lambda s: s["infiniband"] and sorted(p.get("rate", "") for p in s["infiniband"] if _active(p))
    for name, fact in facts.items():
        values = Counter(str(fact(seen)) for seen in probes)
        usual = values.most_common(1)[0][0] if values else "none"
        odd = [f"{seen['host']}: {fact(seen)}" for seen in probes if str(fact(seen)) != usual]
        level = "ok" if not odd else "fatal" if name in ("data", "checkpoint") else "error"
        yield Finding(level, f"same {name}", f"most: {usual}; but {'; '.join(odd)}" if odd else usual)


def _racks(probes: Sequence[dict[str, Any]], gpus: int, group: int) -> Iterator[Finding]:
    """A context-parallel group of several nodes must lie in one NVLink domain: one NVL72 rack. Slurm places by segment."""
    if (span := group // gpus) < 2:
        return
    domains = [{d["nvlink_domain"] for d in seen["gpu"]["gpus"]} if seen["gpu"] else {None} for seen in probes]
    if any(None in found for found in domains):
        yield Finding("unknown", "racks", f"TP * CP = {group} ranks span {span} nodes; a node reports no NVLink domain")
        return
    split = []
    for first in range(0, len(probes), span):
        if len(set.union(*domains[first : first + span])) > 1:
            split.append(" and ".join(seen["host"] for seen in probes[first : first + span]))
    cure = f"sbatch --segment=N with a multiple of {span} places whole groups (SBATCH_SEGMENT_SIZE needs Slurm 25.05.1)"
    good = f"every group of {group} ranks lies in one NVLink domain, {len(set.union(*domains))} in all"
    text = f"TP * CP = {group} ranks exchange keys and values, but have no common NVLink domain: {', '.join(split)}; {cure}"
    yield _judged("racks", not split, text if split else good)


def _active(port: dict[str, str]) -> bool:
    return port.get("state") == "Active"


def judge_allreduce(measured: float | None, nodes: int, accelerator: str) -> Finding:
    """Bus bandwidth in GB/s against the floor of this accelerator."""
    if measured is None:
        return Finding("error", "all-reduce", "the test printed no result", JOB)
    if not (expected := LINKS.get(accelerator)):
        text = f"{measured:.1f} GB/s; no floor for ACCELERATOR={accelerator or 'unset'}"
        return Finding("unknown", "all-reduce", text, JOB)
    floor = expected.allreduce_one_node if nodes == 1 else expected.allreduce_many_nodes
    text = f"{measured:.1f} GB/s bus bandwidth, at least {floor:g} expected"
    if measured >= floor:
        return Finding("ok", "all-reduce", text, JOB)
    hint = "NCCL_DEBUG=INFO names the interface taken; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it"
    return Finding("error", "all-reduce", f"{text}: {hint}", JOB)


def stops_at(mode: str) -> str:
    """The level of a finding that stops the job under HEALTH=off, warn or fail."""
    return "error" if mode == "fail" else "fatal"
