"""Safeguards: is a message unsafe, by whom is that judged, and what happens then.

    taxonomy    the categories                prompt     Llama Guard's question and its answer
    classifier  a small text classifier       corpus     what it is trained on
    judges      both kinds behind one call    policy     what each category brings about
    watch       replies that are still growing
    prune       a mixture of experts without its routed experts, which Llama Guard 4 began as

    judge = judges.open_judge("runs/guard")            # or the folder of a Llama Guard 4
    judge.judge([{"role": "user", "content": "..."}])  # -> Verdict

The server and the terminal chat take `--guard`; nothing is on by default.
"""
