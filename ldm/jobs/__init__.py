"""Batch jobs: prompt files to folders of images, each generated exactly once by any number of workers."""
