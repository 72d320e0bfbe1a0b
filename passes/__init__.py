"""Graph in, graph out: capture, lift, prove, choose, lower, verify. One concept a file; never imports codegen."""
