"""The paper's pilot studies (section 3, appendix D): what the codebooks hold, and what that does to a transformer.

cosine.py         how orthogonal the features of different codebooks are (property 1)
gradients.py      the angles between the gradients that the heads send back (influence 1)
semantics.py      how well each codebook alone tells classes apart (property 2)
convergence.py    how fast and how far each codebook's loss falls (influence 2)
task_vectors.py   how alike the experts' ways from their first weights are (appendix D.3)

Each is a function from data to numbers; draw_*.py draw them; `siren study` runs both.
"""
