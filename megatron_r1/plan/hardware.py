"""Machines as the plan sees them. Every number that is not arithmetic is in this file, with where it comes from."""

from dataclasses import dataclass, field

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Hardware:
    """One GPU, its node and its network.

    Rates are what programs achieve, not peaks. Those marked (fitted) are set so that published times of whole training
    steps of DeepSeek-V3 come out (docs/planner.md); those of other models are predictions.
    """

    name: str
    memory: float
    """Bytes of a GPU."""
    peak: dict[str, float]
    """FLOP/s of the data sheet, dense, by precision."""
    products: dict[str, float]
    """FLOP/s in matrix products of linear layers, by precision."""
    attention: float
    """FLOP/s of attention's scores and weighted values, forward and backward pass together."""
    memory_rate: float
    """Bytes/s to and from a GPU's memory."""
    passes: dict[str, float]
    """How often each byte that is kept for the backward pass goes through memory outside of products, both passes."""
    node_link: float
    """Bytes/s of a GPU to others of its node, one direction."""
    network: float
    """Bytes/s of a GPU to other nodes."""
    gpus_per_node: int = 8
    host_memory: float = 2.0 * 2**40
    """Bytes of a node."""
    storage: float = 2.0 * GIGA
    """Bytes/s of a node to shared storage."""
    host_link: float = 25.0 * GIGA
    """Bytes/s of a GPU to its host."""
    host_rate: float = 30.0 * GIGA
    """Bytes/s to and from a host's memory, each GPU's share, in an optimizer that works there."""
    context: float = 1.0 * GIB
    """Bytes of CUDA's context, cuBLAS and the kernels."""
    communicator: float = 0.4 * GIB
    """Bytes of NCCL's buffers for each process group that a rank is in."""
    lost: float = 0.05
    """Share of torch's memory that fragmentation loses."""
    exchange_share: float = 20 / 132
    """Share of a GPU's multiprocessors that an exchange takes while it is hidden behind computation."""
    hidden: float = 0.9
    """Share of an exchange that is hidden where it is overlapped with computation."""
    layer_latency: float = 150e-6
    """Seconds that a forward pass of a layer takes at least: launches of kernels, and of all-to-alls."""
    decode_layer: dict[str, float] = field(default_factory=dict)
    """Seconds that one decoding step takes in a layer besides reading memory: in engines of one node, of several, and
    of several without CUDA graphs ("eager")."""
    engine_memory: float = 0.9
    """Share of a GPU that vLLM takes, its default."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where the numbers come from, by field."""


H100 = Hardware(
    name="H100 SXM, 8 in a node, one 400 Gbit/s port each",
    memory=79.1 * GIB,
    peak={"bfloat16": 989 * TERA, "fp8": 1979 * TERA, "float32": 495 * TERA},
    products={"bfloat16": 700 * TERA, "fp8": 800 * TERA, "float32": 300 * TERA},
    attention=450 * TERA,
    memory_rate=3.0e12 * 0.85,
    passes={"bfloat16": 5.0, "fp8": 6.5, "float32": 5.0},
    node_link=350 * GIGA,
    network=45 * GIGA,
    decode_layer={"node": 120e-6, "nodes": 500e-6, "eager": 1.55e-3},
    sources={
        "memory": "80 GB card: 81,559 MiB less what the driver keeps",
        "peak": "NVIDIA's data sheet, dense; float32 by TF32",
        "products": (
            "(fitted) one H100 does 798 TFLOP/s in bfloat16 on 8192^3, a model's mix of shapes 88 % of that. fp8: in "
            "blocks of 128, from 330 TFLOP/s of DeepSeek-V3 on 1,024 H100"
        ),
        "attention": "FlashAttention 3 (arXiv 2407.08608): 550-650 forward, 400-500 backward at head size 128",
        "memory_rate": "3.0 TB/s measured in a copy; 85 % of it in short kernels",
        "passes": "(fitted) written and read in each pass, and the gradient; in fp8 also quantised",
        "node_link": "NVLink 4: 450 GB/s a direction, about 78 % in collectives",
        "network": "50 GB/s a port, 90 % of it",
        "storage": "assumption: a parallel file system",
        "context": "assumption",
        "communicator": "assumption: 10 GB and more in 20 to 30 groups were seen (slime v0.1.0)",
        "decode_layer": (
            "(fitted) on several nodes from 1,050 s of verl's rollout without CUDA graphs and 64 s of NeMo-RL's with "
            "them, both of DeepSeek-V3 over 32 GPUs; on one node an assumption"
        ),
        "exchange_share": "DeepSeek-V3, 3.2.2: 20 of 132",
        "host_link": "PCIe 5, 16 lanes: about half of what its data sheet says, shared by two GPUs in many machines",
        "host_rate": "assumption: half of two sockets' 500 GB/s, over 8 GPUs",
        "hidden": "assumption: the first and last microbatches have nothing to hide behind",
        "layer_latency": "assumption: some 30 kernels",
    },
)
