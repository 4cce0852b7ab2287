"""`loraloom adapter VERB`: one module for each verb, with HELP (a line), EXAMPLES, `add_arguments` and `run`."""
