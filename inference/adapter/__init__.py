"""`loraloom adapter VERB`: one module for each verb, with `run`; their arguments are in `adapter_arguments`."""
