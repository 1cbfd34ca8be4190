"""megatron_omni: training omni speech language models with ZeRO-3 x tensor parallelism, tar shards and Mimi targets."""

__version__ = "0.1.0"
