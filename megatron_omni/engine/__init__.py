"""DeepSpeed meets the model: building, stepping, and the adapter to ZeRO's sharded state."""
