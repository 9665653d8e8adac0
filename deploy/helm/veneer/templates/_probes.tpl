{{/*
Probes need no API key: health is open to everybody.
- Without TLS, those of gRPC: readiness is the status of the service that the component is for.
- With TLS, over HTTPS, since Kubernetes' gRPC probes speak no TLS. It does not check the certificate.
- With certificates of clients, by `veneer health` in the container: Kubernetes has no certificate to show.
*/}}
{{- define "veneer.probes" -}}
{{- $v := .root.Values -}}
{{- $ready := include "veneer.readiness" . -}}
startupProbe:
  {{- $ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: {{ include "veneer.probeTimeout" .root }}
  failureThreshold: {{ div (add $v.startup.seconds 4) 5 }}
readinessProbe:
  {{- $ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: {{ include "veneer.probeTimeout" .root }}
  failureThreshold: 2
livenessProbe:
  {{- include "veneer.liveness" . | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{- define "veneer.probeTimeout" -}}
{{- ternary 10 3 (and .Values.tls.enabled .Values.tls.clients.enabled) -}}
{{- end -}}

{{- define "veneer.probeHost" -}}
{{- default (include "veneer.host" .) .Values.tls.clients.serverName -}}
{{- end -}}

{{- define "veneer.readiness" -}}
{{- $v := .root.Values -}}
{{- if not $v.tls.enabled -}}
grpc:
  port: {{ $v.ports.grpc }}
  service: {{ ternary "veneer.v1.AdapterService" "veneer.v1.InferenceService" (eq .component "registry") }}
{{- else if $v.tls.clients.enabled -}}
exec:
  command:
    - veneer
    - --server=https://{{ include "veneer.probeHost" .root }}:{{ $v.ports.grpc }}
    - --ca=/run/secrets/probe/ca.crt
    - --cert=/run/secrets/probe/tls.crt
    - --key=/run/secrets/probe/tls.key
    - health
{{- else -}}
{{ include "veneer.https" (dict "path" "/health" "port" "http") }}
{{- end -}}
{{- end -}}

{{/* Not the engine's: a server that loads, or whose engine restarts, is not helped by a restart. */}}
{{- define "veneer.liveness" -}}
{{- $v := .root.Values -}}
{{- if not $v.tls.enabled -}}
grpc:
  port: {{ $v.ports.grpc }}
{{- else if $v.tls.clients.enabled -}}
tcpSocket:
  port: grpc
{{- else -}}
{{ include "veneer.https" (dict "path" "/livez" "port" "http") }}
{{- end -}}
{{- end -}}

{{/* The name localhost is always accepted; the pod's address is not once --allowed-hosts is given. */}}
{{- define "veneer.https" -}}
httpGet:
  path: {{ .path }}
  port: {{ .port }}
  scheme: HTTPS
  httpHeaders:
    - {name: Host, value: localhost}
{{- end -}}
