"""Fine-tuning: annotated rows in, model folders out; several tasks may share one encoder.

Read in this order: `config` (what may be set), `examples` (rows become model inputs with targets),
`plan` (which of them are computed together, when and by which worker), `heads` (the models and
their losses), `loop` (the training itself), `run` (Ray Train around it).
"""
