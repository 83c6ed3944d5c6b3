"""Stage 2: the first expert learns to draw what the later ones make good sound of (paper, section 4.2)."""
