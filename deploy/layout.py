"""The files of an exported model and the forms that it can have. Importing this module does not import Paddle."""
import os

CERTIFICATE = 'certificate.json'  # config.yaml and classes.txt are named in run_folder/layout.py
FORMS = ('training', 'merged', 'fused')  # see fuse.in_form
PRECISIONS = ('fp32', 'bf16', 'int8')  # of dense convolutions, see large_kernel.pack_weights


def is_export(path):
    """Whether `path` is a folder that export.py wrote."""
    return os.path.isfile(os.path.join(path, CERTIFICATE))
