"""The typed configuration: the model's shape (``model``), a run's recipe (``recipe``), and how both are read (``load``)."""
