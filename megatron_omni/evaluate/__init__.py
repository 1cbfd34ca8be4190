"""Scores of exported models: generated text, teacher-forced losses beside entropies, speech to listen to."""
