package dialect

import "google.golang.org/protobuf/reflect/protoreflect"

// generationKinds are what the methods of fmaas.GenerationService are for.
var generationKinds = map[string]Kind{
	"Generate":       Inference,
	"GenerateStream": Inference,
	"Tokenize":       Metadata, // no model runs
	"ModelInfo":      Metadata,
}

// engineKinds are what the methods of vllm.grpc.engine.VllmEngine and of
// sglang.grpc.scheduler.SglangScheduler are for, beside management.
var engineKinds = map[string]Kind{
	"Generate":     Inference,
	"Embed":        Inference,
	"HealthCheck":  Health,
	"GetModelInfo": Metadata,
}

// TGIS is fmaas.GenerationService as TGIS, vLLM's adapter for it and caikit speak
// it. A call is one inference, also where it has several prompts: their limits and
// counts are added up.
func TGIS(o Options) (*Dialect, error) {
	return language("tgis", "fmaas.GenerationService", generationKinds, o)
}

// VLLM is vllm.grpc.engine.VllmEngine, which vLLM's own gRPC server speaks. Its
// requests name no model, so that Options.Model says which it is. What has the
// engine reach for other hosts, files and shared memory is forbidden, and prompts
// may be token ids, which Request.PromptIDs points to.
func VLLM(o Options) (*Dialect, error) {
	return language("vllm", "vllm.grpc.engine.VllmEngine", engineKinds, o)
}

// SGLang is sglang.grpc.scheduler.SglangScheduler, which SGLang's gRPC server speaks.
// Its requests name no model, so that Options.Model says which it is; their prompts are
// token ids, which Request.PromptIDs points to. What has the engine reach for other hosts
// and files, or run a caller's code, is forbidden.
func SGLang(o Options) (*Dialect, error) {
	return language("sglang", "sglang.grpc.scheduler.SglangScheduler", engineKinds, o)
}

func language(name string, service protoreflect.FullName, kinds map[string]Kind, o Options) (*Dialect, error) {
	set, err := apis()
	if err != nil {
		return nil, err
	}
	d := newDialect(name, o, nil)
	err = d.add(set, o, func(sd protoreflect.ServiceDescriptor, md protoreflect.MethodDescriptor) (Kind, bool) {
		return kinds[string(md.Name())], sd.FullName() == service
	})
	if err != nil {
		return nil, err
	}
	for _, m := range d.Methods {
		m.batched = m.Kind == Inference && !m.ServerStreams
	}
	return d, nil
}
