"""The learning itself, in plain torch: images, views, networks, pretraining and probes.

Knows nothing of studies, trials or databases.
"""
