// Publishes an adapter, generates with it whole and streamed, and shows how an
// error and an abandoned stream look. Prints what it found as one JSON object.
//
//	client ADDRESS ADAPTER_FOLDER
//
// A key in VENEER_API_KEY is sent along; with one, use credentials for TLS too.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	veneer "veneer/v1"
)

const chunkBytes = 1 << 20

type refused struct {
	Code   string `json:"code"`
	Reason string `json:"reason"`
	Field  string `json:"field"`
}

type found struct {
	Base      string    `json:"base"`
	Revision  string    `json:"revision"`
	Text      string    `json:"text"`
	Streamed  string    `json:"streamed"`
	Finish    string    `json:"finish"`
	Tokens    []uint32  `json:"tokens"`
	Logprobs  []float32 `json:"logprobs"`
	Prompt    uint32    `json:"prompt_tokens"`
	Completed uint32    `json:"completion_tokens"`
	Refused   refused   `json:"refused"`
	Abandoned string    `json:"abandoned"`
}

// push uploads the files of a folder under a name: first what they are, then
// their bytes.
func push(ctx context.Context, adapters veneer.AdapterServiceClient, folder, name string) (*veneer.Adapter, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	spec := &veneer.UploadSpec{Name: name, AllowReplace: true}
	contents := map[string][]byte{}
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(folder, entry.Name()))
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(data)
		spec.Files = append(spec.Files, &veneer.UploadFile{
			Name: entry.Name(), Size: uint64(len(data)), Sha256: hex.EncodeToString(sum[:]),
		})
		contents[entry.Name()] = data
	}
	upload, err := adapters.UploadAdapter(ctx)
	if err != nil {
		return nil, err
	}
	// If a send fails, CloseAndRecv has the server's reason.
	upload.Send(&veneer.UploadAdapterRequest{
		Message: &veneer.UploadAdapterRequest_Spec{Spec: spec},
	})
	for _, file := range spec.Files {
		data := contents[file.Name]
		for at := 0; at < len(data); at += chunkBytes {
			end := min(at+chunkBytes, len(data))
			chunk := &veneer.UploadChunk{File: file.Name, Offset: uint64(at), Data: data[at:end]}
			upload.Send(&veneer.UploadAdapterRequest{
				Message: &veneer.UploadAdapterRequest_Chunk{Chunk: chunk},
			})
		}
	}
	answer, err := upload.CloseAndRecv()
	return answer.GetAdapter(), err
}

func request(adapter string, tokens uint32) *veneer.GenerateRequest {
	return &veneer.GenerateRequest{
		Adapter:  adapter,
		Input:    &veneer.GenerateRequest_Prompt{Prompt: "The sea is"},
		Sampling: &veneer.SamplingOptions{Temperature: proto.Float64(0), Seed: proto.Uint64(7)},
		Stopping: &veneer.StoppingOptions{MaxTokens: proto.Uint32(tokens), IgnoreEos: true},
		Output:   &veneer.OutputOptions{Logprobs: true},
	}
}

// stream returns the text of all messages, and the last message's summary.
func stream(ctx context.Context, inference veneer.InferenceServiceClient, adapter string) (string, *veneer.GenerateStreamFinal, error) {
	messages, err := inference.GenerateStream(ctx, request(adapter, 8))
	if err != nil {
		return "", nil, err
	}
	var text strings.Builder
	for {
		message, err := messages.Recv()
		if err != nil {
			return "", nil, err
		}
		text.WriteString(message.Text)
		if message.Final != nil {
			return text.String(), message.Final, nil
		}
	}
}

// explain takes an error apart: its status, the server's reason, the field at fault.
func explain(err error) refused {
	given := status.Convert(err)
	told := refused{Code: given.Code().String()}
	for _, detail := range given.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			told.Reason = detail.Reason
		case *errdetails.BadRequest:
			told.Field = detail.FieldViolations[0].Field
		}
	}
	return told
}

func run(address, folder string) (*found, error) {
	connection, err := grpc.NewClient(
		address, grpc.WithTransportCredentials(insecure.NewCredentials()),
	)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if key := os.Getenv("VENEER_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	inference := veneer.NewInferenceServiceClient(connection)
	info, err := veneer.NewServerServiceClient(connection).
		GetServerInfo(ctx, &veneer.GetServerInfoRequest{})
	if err != nil {
		return nil, err
	}
	adapter, err := push(ctx, veneer.NewAdapterServiceClient(connection), folder, "from-go")
	if err != nil {
		return nil, err
	}
	whole, err := inference.Generate(ctx, request(adapter.Name, 8))
	if err != nil {
		return nil, err
	}
	streamed, final, err := stream(ctx, inference, adapter.Name)
	if err != nil {
		return nil, err
	}
	wrong := request(adapter.Name, 8)
	wrong.Sampling.TopP = proto.Float64(3)
	_, refusal := inference.Generate(ctx, wrong)

	// A stream ends when its context does; the server then ends the work too.
	leaving, leave := context.WithCancel(ctx)
	messages, err := inference.GenerateStream(leaving, request(adapter.Name, 32))
	if err != nil {
		return nil, err
	}
	for err == nil {
		_, err = messages.Recv()
		leave()
	}
	told := &found{
		Base:      info.BaseModel.Name,
		Revision:  adapter.Revision,
		Text:      whole.Text,
		Streamed:  streamed,
		Finish:    final.FinishReason.String(),
		Tokens:    whole.TokenIds,
		Prompt:    final.Usage.PromptTokens,
		Completed: final.Usage.CompletionTokens,
		Refused:   explain(refusal),
		Abandoned: status.Code(err).String(),
	}
	for _, score := range whole.Logprobs {
		told.Logprobs = append(told.Logprobs, score.Logprob)
	}
	if status.Code(err) != codes.Canceled {
		return nil, err
	}
	return told, nil
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "give the server's address and an adapter's folder")
		os.Exit(2)
	}
	told, err := run(os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
	shown, _ := json.Marshal(told)
	fmt.Println(string(shown))
}
