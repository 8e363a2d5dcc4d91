"""The main job: two equal networks on padded batches of real data, one batch norm each."""
