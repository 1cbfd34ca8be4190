"""What a run did, as one HTML page: charts (``curves``) and the page around them (``page``)."""
