"""`loraloom adapter VERB`: one module for each verb, with EXAMPLES, `add_arguments` and `run`."""
