"""Sound: reading and resampling waveforms, log-mel features, and the Mimi codec."""
