#include "tq-attention-instances.cuh"

TQ_ATTENTION_INSTANCES(TQ_KIND_QJL, 3, TQ_KIND_MSE);
