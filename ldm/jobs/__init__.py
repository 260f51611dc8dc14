"""Batch jobs: prompt files to folders of images, each generated exactly once by any number of workers.

- row: what a prompt file says of one prompt (`readers.PromptRow`)
- record: the requests of a row, all seeds and wildcards (`source.PromptRecord`); of a manifest: a line as JSON
- entry: one of these requests (`source.PromptEntry`)
- item: a resolved entry with its id (`worker.JobItem`); equal requests are one item
- line: the result of an item in a manifest, from which a job is resumed: `worker` skips what is finished there
"""
