"""Evaluation of generated sounds: embedding models, distances and scores (paper, section 5 and appendix D)."""
