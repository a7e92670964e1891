"""On one GPU: an RTO step beside TRL's, the share of the peak in training, and of the memory's bandwidth in decoding.

    python -m benchmarks.gpu_step [--model=1B] [--parts train decode step] [--out=FOLDER]

`train`: forward, backward and Adam of a policy, rows of 2048 tokens, half of them response, bfloat16 and, where the GPU
has them, products in 8 bits; FLOPs are those that the mathematics asks for (`throughput.flops`), so computing anything
again counts nothing. `decode`: tokens for 64 responses at once, after prompts of 512, with steps
recorded and without, keys and values in slots and in blocks of 256; the fastest counts; bytes are those of the weights
once a step and of the keys and values that are attended to; beside it Megatron-Core's own dynamic engine
(`benchmarks.megatron_decode`) with its CUDA graphs and without, or what it lacks here, or how it failed. `step`:
`benchmarks.trl_ppo` in bfloat16, after its gate in float32; left out where TRL is not installed.

Every part runs in a process of its own. What was found goes, with device and versions, to benchmarks/results/gpu/
DEVICE.json. Goals, of 1B on one H100: a step at least 3 times as fast as TRL's, 45 % of the peak, 70 % of the
bandwidth. On a CPU it runs with a small model (`--model=1M --small`), to see that it works, and writes only with --out.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import megatron_decode, steps
from benchmarks.machine import RESULTS, machine, spread
from benchmarks.shapes import VOCAB, model_config
from benchmarks.throughput import flops

PEAKS = {
    r"H200 NVL": (836e12, 4.8e12),
    r"H200": (989e12, 4.8e12),
    r"H100 PCIe": (756e12, 2.0e12),
    r"H100 NVL": (835e12, 3.9e12),
    r"H100": (989e12, 3.35e12),
    r"A100.SXM.*40GB|A100.PCIE.*40GB": (312e12, 1.555e12),
    r"A100.*PCIe": (312e12, 1.935e12),
    r"A100": (312e12, 2.039e12),
}
"""Device name -> dense bfloat16 FLOP/s and bytes a second of memory, the first that fits. NVIDIA's data sheets "H100
Tensor Core GPU" (SXM, PCIe, NVL), "H200 Tensor Core GPU" and "A100 Tensor Core GPU"; what they give with sparsity is
halved."""
GOALS = {"times_as_fast": 3.0, "share_of_peak": 0.45, "share_of_bandwidth": 0.7}
"""Of 1B on one H100."""
GATE_TOKENS = 16
"""Of a response at most: in the gate TRL has the activations of two models of all rows at once, in float32."""
PARTS = ("train", "decode", "step")
DECODE = {
    "decode": {},
    "decode_recorded": {"recorded": True},
    "decode_blocks": {"kv_block_tokens": 256},
    "decode_blocks_recorded": {"kv_block_tokens": 256, "recorded": True},
}
"""Ways of our engine -> its options."""
MEGATRON = {"megatron_decode": False, "megatron_decode_graphs": True}
"""Ways of Megatron's -> whether it has CUDA graphs."""
SIZES = {
    False: {"rows": 16, "length": 2048, "micro": 8, "slots": 64, "prompt": 512, "new": 128, "mean": 128, "repeat": 10},
    True: {"rows": 4, "length": 64, "micro": 2, "slots": 4, "prompt": 16, "new": 8, "mean": 12, "repeat": 2},
}
"""Whether small -> sizes of the parts."""


def peak_of(device: str) -> tuple[float, float] | None:
    """FLOP/s and bytes a second of a device by its name; None where they are not known."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device)), None)


def training(name: str, sizes: dict[str, int], fp8: str) -> dict[str, Any]:
    """Seconds and FLOP/s of optimizer steps of a policy."""
    from rto_megatron.batch import Experience
    from rto_megatron.config.algorithm import PPOConfig
    from rto_megatron.config.optimizer import OptimizerConfig
    from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.optimizer import make_trainable
    from rto_megatron.distributed.runtime import peak_bytes, start_runtime, wait_for_device
    from rto_megatron.distributed.step import token_log_probs, train_step
    from rto_megatron.models.gpt import build_model
    from rto_megatron.stages.update import make_policy_loss

    compute, parallel = ComputeConfig(dtype="bfloat16", fp8=fp8, log_prob_chunk=4096), ParallelConfig()  # type: ignore[arg-type]
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    rows, length, config = sizes["rows"], sizes["length"], model_config(name, max_length=sizes["length"])
    model = build_model(config, mesh, kind="policy", parallel=parallel, compute=compute)
    trainable = make_trainable("policy", model, OptimizerConfig(), mesh)
    shape, response = (rows, length), length // 2
    batch = Experience(
        tokens=torch.randint(0, VOCAB[name], shape),
        num_tokens=torch.full((rows,), length),
        response_mask=(torch.arange(length) >= length - response).expand(shape).clone(),
        old_log_probs=torch.full(shape, -6.0),
        **{key: torch.randn(shape) for key in ("old_values", "advantages", "returns")},
    ).to(mesh.device)
    loss = make_policy_loss(PPOConfig(loss_mean="token"), rows * response)
    cut, seconds = Cut(tokens=sizes["micro"] * length, packed=True), []
    for _ in range(2 + sizes["repeat"]):
        wait_for_device()
        start = time.perf_counter()
        train_step(trainable, batch, token_log_probs, loss, mesh, cut=cut, lr=1e-6, num_sums=6)
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    took = spread(seconds[2:])
    rate = 3 * flops(config, "policy", rows, length, response) / took["median"]
    found = {"seconds": took, "flops": rate, "tokens_per_second": rows * length / took["median"], "fp8": fp8}
    return found | {"layers": _layers(mesh, compute), "peak_bytes": peak_bytes()}


def decoding(name: str, sizes: dict[str, int], **options: Any) -> dict[str, Any]:
    """Seconds and bytes of decode steps of a full batch.

    Args:
        options: of the engine.
    """
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime, wait_for_device
    from rto_megatron.models.gpt import build_model
    from rto_megatron.rollout.engine import Request, RolloutEngine

    compute, parallel = ComputeConfig(dtype="bfloat16"), ParallelConfig()
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    longest = sizes["prompt"] + sizes["new"] + 1
    config = model_config(name, max_length=longest)
    model = build_model(config, mesh, kind="policy", parallel=parallel, compute=compute).eval()
    generator = torch.Generator().manual_seed(0)
    requests = [
        Request(
            uid=uid,
            prompt=tuple(torch.randint(1, VOCAB[name], (sizes["prompt"],), generator=generator).tolist()),
            max_new_tokens=sizes["new"] + 1,
            seed=uid,
        )
        for uid in range(sizes["slots"])
    ]
    engine = RolloutEngine(model, max_slots=len(requests), max_length=longest, eos_ids=(), **options)
    batch = engine.batch(requests)
    start = time.perf_counter()
    batch.admit(requests)
    wait_for_device()
    prefill, seconds, attended = time.perf_counter() - start, [], []
    cache_bytes = 0
    while batch.num_live:
        before, start = batch.num_attended, time.perf_counter()
        batch.decode()
        wait_for_device()
        seconds.append(time.perf_counter() - start)
        attended.append(batch.num_attended - before)
        cache_bytes = batch.cache_bytes
    weights = sum(parameter.nbytes for parameter in model.parameters())  # tied: the output layer is the embedding
    a_token = 2 * config.num_layers * config.num_query_groups * config.kv_channels * compute_bytes(compute)
    warm = len(seconds) // 4
    rates = [(weights + a_token * tokens) / took for took, tokens in zip(seconds[warm:], attended[warm:], strict=True)]
    took = spread(seconds[warm:])
    return {
        "seconds": took,
        "prefill_seconds": prefill,
        "tokens_per_second": len(requests) / took["median"],
        "bytes_per_second": spread(rates)["median"],
        "cache_bytes": cache_bytes,
    }


def compute_bytes(compute: Any) -> int:
    """Of a number."""
    return 2 if compute.dtype == "bfloat16" else 4


def _layers(mesh: Any, compute: Any) -> str:
    return "Transformer Engine" if mesh.runtime.has_fused_layers(compute.dtype) else "local"


def beside_trl(name: str, sizes: dict[str, int]) -> dict[str, Any]:
    """One RTO step of ours and of TRL's, in turn, after the gate."""
    from benchmarks import trl_ppo

    with tempfile.TemporaryDirectory() as kept, steps.inputs(name, Path(kept)) as folder:
        once: dict[str, Any] = {"mean": min(GATE_TOKENS, sizes["mean"]), "num_minibatches": 1, "num_steps": 1}
        task = steps.make_task(folder, name, "rto", parts=["equal"], **once)
        apart = steps.gate(task, lambda path, numbers: _theirs(trl_ppo, task, path, numbers))
        task = steps.make_task(folder, name, "rto", mean=sizes["mean"], parts=["drawn"], num_steps=3, dtype="bfloat16")
        more = ["--compute.micro_batch_tokens=16384", "--compute.score_micro_batch_tokens=32768"]
        more += ["--rollout.max_slots=64", "--compute.log_prob_chunk=4096"]
        sides = {
            "ours": lambda: steps.run_ours(task, ranks=1, more=more),
            "trl": lambda: trl_ppo.run_trl(task, [64]),
        }
        found = steps.alternate(sides)
    took = {side: each["parts"]["drawn"]["step_seconds"] for side, each in found.items()}
    ratio = took["trl"]["median"] / took["ours"]["median"]
    return {"gate": apart, "seconds": took, "phases": found["ours"]["parts"]["drawn"], "times_as_fast": ratio}


def _theirs(trl_ppo: Any, task: Any, path: Path, numbers: Path) -> None:
    trl_ppo.run_trl(task, [32], numbers, path)


def where() -> dict[str, Any]:
    """Device, its peaks, and versions of all that has a part in it."""
    from rto_megatron.distributed.runtime import inspect_hardware

    hardware, packages = inspect_hardware(), ("transformer-engine", "apex", "trl", "transformers")
    found = machine() | {"device": hardware.device, "driver": hardware.driver, "torch_build": hardware.torch_build}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"peak": peak_of(hardware.device)}


def judge(found: dict[str, Any], model: str) -> dict[str, Any]:
    """Shares of the peaks, and whether the goals are met; null where they are about something else."""
    peak, shares = found["machine"]["peak"], {}

    def best(ways: Iterable[str], what: str) -> float | None:
        """The largest of those that did not fail."""
        return max((found[way][what] for way in ways if what in (found.get(way) or {})), default=None)

    flops_found, bytes_found = best(["train"], "flops"), best(DECODE, "bytes_per_second")
    if peak and flops_found:
        shares["share_of_peak"] = flops_found / peak[0]
    if peak and bytes_found:
        shares["share_of_bandwidth"] = bytes_found / peak[1]
    ours, theirs = (best(ways, "tokens_per_second") for ways in (DECODE, MEGATRON))
    if ours and theirs:
        shares["decode_over_megatron"] = ours / theirs
    if times := best(["step"], "times_as_fast"):
        shares["times_as_fast"] = times
    counts = model == "1B" and "1 x " in found["machine"]["device"] and "H100" in found["machine"]["device"]
    met = {name: shares[name] >= goal if counts and name in shares else None for name, goal in GOALS.items()}
    return {"shares": shares, "goals": GOALS, "met": met}


def run_part(part: str, model: str, sizes: dict[str, int], fp8: str = "none") -> dict[str, Any]:
    """In a process of its own, so that each has the whole memory."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        words = ["--part", part, "--model", model, "--sizes", json.dumps(sizes), "--fp8", fp8, "--out", out.name]
        steps.run_python("benchmarks.gpu_step", *words)
        return json.load(out)


def be_part(part: str, model: str, sizes: dict[str, int], fp8: str) -> dict[str, Any]:
    """What the process of a part finds."""
    if part in DECODE:
        return decoding(model, sizes, **DECODE[part])
    if part in MEGATRON:
        return megatron_decode.measure(model, sizes, graphs=MEGATRON[part])
    return training(model, sizes, fp8)


def beside_megatron(model: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Its engine's numbers, or why there are none: nothing of ours depends on them."""
    if lacks := megatron_decode.missing():
        return {way: {"missing": lacks} for way in MEGATRON}
    return {way: tried(run_part, way, model, sizes) for way in MEGATRON}


def tried(part: Callable[..., dict[str, Any]], *words: Any) -> dict[str, Any]:
    """What a part finds, or how it failed: what the others found is worth keeping."""
    try:
        return part(*words)
    except SystemExit as error:
        return {"failed": str(error)[-2000:]}


def main() -> None:
    """All parts, the goals, and the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1B", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--small", action="store_true", help="few and short rows")
    parser.add_argument("--out", type=Path, help="folder of the result; benchmarks/results/gpu on a GPU")
    for hidden in ("--part", "--sizes", "--fp8"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sizes = json.loads(options.sizes)
        options.out.write_text(json.dumps(be_part(options.part, options.model, sizes, options.fp8)))
        return
    found = measure(options.model, options.parts, small=options.small, out=options.out)
    print(json.dumps(found, indent=1))
    # not Megatron's: nothing of ours depends on it
    failed = [
        part for part, told in found.items() if part not in MEGATRON and isinstance(told, dict) and "failed" in told
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def measure(model: str, parts: Sequence[str], *, small: bool, out: Path | None) -> dict[str, Any]:
    """Run the parts, and write what they found."""
    from rto_megatron.distributed.runtime import inspect_hardware

    hardware, sizes = inspect_hardware(), SIZES[small]
    if not hardware.num_gpus and not small:
        sys.exit("there is no NVIDIA GPU here; to see that it works on a CPU: --model=1M --small --out=FOLDER")
    found: dict[str, Any] = {"machine": where(), "model": model, "sizes": sizes}
    if "train" in parts:
        found["train"] = tried(run_part, "train", model, sizes)
        if (hardware.capability or (0, 0)) >= (8, 9) and find_spec("transformer_engine"):
            found["train_fp8"] = tried(run_part, "train", model, sizes, "hybrid")
    if "decode" in parts:
        found |= {way: tried(run_part, way, model, sizes) for way in DECODE} | beside_megatron(model, sizes)
    if "step" in parts:
        found["step"] = tried(beside_trl, model, sizes) if find_spec("trl") else None  # None: TRL is not installed
    found |= judge(found, model) | {"load_average_after": os.getloadavg()}
    out = out or (RESULTS / "gpu" if hardware.num_gpus else None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{re.sub(r'[^A-Za-z0-9]+', '_', hardware.device).strip('_')}_{model}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {path}")
    return found


if __name__ == "__main__":
    main()
