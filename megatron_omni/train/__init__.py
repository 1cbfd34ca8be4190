"""A training run: what is trained on what (``main``), the loop (``loop``), the schedule, and where its reports go."""
