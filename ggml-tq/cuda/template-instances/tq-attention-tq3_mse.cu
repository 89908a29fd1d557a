#include "tq-attention-instances.cuh"

TQ_ATTENTION_INSTANCES(TQ_KIND_MSE, 3, TQ_KIND_MSE);
