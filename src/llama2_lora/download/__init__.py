"""What download_dataset.py and download_model.py need: the hub, other forms of the data set, files in pieces."""
