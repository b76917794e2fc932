"""What is computed: arrays and frames in, arrays and frames out.

No network, no plugins, no Prefect; files only in the readers (`kl.input.responses`) and writers (`kl.output.files`).
"""
