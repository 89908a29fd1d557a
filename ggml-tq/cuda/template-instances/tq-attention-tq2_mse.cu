#include "tq-attention-instances.cuh"

TQ_ATTENTION_INSTANCES(TQ_KIND_MSE, 2, TQ_KIND_MSE);
