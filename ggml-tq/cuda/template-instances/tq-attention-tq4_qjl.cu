#include "tq-attention-instances.cuh"

TQ_ATTENTION_INSTANCES(TQ_KIND_QJL, 4, TQ_KIND_MSE);
