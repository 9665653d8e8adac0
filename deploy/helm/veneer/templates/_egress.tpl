{{/* What a component may connect to. */}}

{{/* Ports that a URL names, of several hosts too. Argument: (dict "url" ... "default" 5432). */}}
{{- define "veneer.portsOf" -}}
{{- $authority := regexFind "//[^/?]*" .url | trimPrefix "//" -}}
{{- $found := list -}}
{{- range $host := splitList "," (regexReplaceAll "^.*@" $authority "") -}}
{{- with regexFind ":[0-9]+$" $host -}}{{- $found = append $found (trimPrefix ":" .) -}}{{- end -}}
{{- end -}}
{{- with regexFind "[?&]port=[0-9]+" .url -}}{{- $found = append $found (regexFind "[0-9]+$" .) -}}{{- end -}}
{{- if not $found -}}
{{- $found = list (hasPrefix "http://" .url | ternary "80" (toString .default)) -}}
{{- end -}}
{{- range uniq $found }}
- {port: {{ . }}, protocol: TCP}
{{- end }}
{{- end -}}

{{/* Argument: (dict "peers" list "ports" yaml). */}}
{{- define "veneer.rule" -}}
- ports:
    {{- .ports | trim | nindent 4 }}
  {{- with .peers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* Name servers; OpenShift's listen at 5353. */}}
{{- define "veneer.dnsPorts" -}}
- {port: 53, protocol: UDP}
- {port: 53, protocol: TCP}
- {port: 5353, protocol: UDP}
- {port: 5353, protocol: TCP}
{{- end -}}

{{- define "veneer.egress" -}}
{{- $v := .root.Values -}}
{{- $egress := $v.networkPolicy.egress -}}
{{- $flags := merge (deepCopy .values.flags) $v.flags -}}
- ports:
    {{- include "veneer.dnsPorts" . | nindent 4 }}
  {{- with $egress.dns }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- if eq .component "engine" }}
- ports:
    - {port: {{ $v.ports.grpc }}, protocol: TCP}
  to:
    - podSelector:
        matchLabels:
          {{- include "veneer.selector" (dict "root" .root "component" "registry") | nindent 10 }}
{{- else if $v.catalog.url }}
{{ include "veneer.rule" (dict "peers" $egress.catalog "ports" (include "veneer.portsOf" (dict "url" $v.catalog.url "default" 5432))) }}
{{- end }}
{{- if $v.store.url }}
{{ include "veneer.rule" (dict "peers" $egress.store "ports" (include "veneer.portsOf" (dict "url" (default "https://s3" $v.store.endpoint) "default" 443))) }}
{{- if not (include "veneer.storeSecret" .) }}
# The role of the machine, or of the pod on EKS.
- ports:
    - {port: 80, protocol: TCP}
  to:
    - ipBlock: {cidr: 169.254.169.254/32}
    - ipBlock: {cidr: 169.254.170.23/32}
{{- end }}
{{- end }}
{{- if $egress.https }}
- ports:
    - {port: 443, protocol: TCP}
{{- end }}
{{- range $name := list "jwt-issuer" "jwt-keys" "otlp-traces-endpoint" }}
{{- $url := get $flags $name }}
{{- if and $url (contains "://" (toString $url)) }}
{{ include "veneer.rule" (dict "peers" list "ports" (include "veneer.portsOf" (dict "url" $url "default" 443))) }}
{{- end }}
{{- end }}
{{- with $egress.more }}
{{ toYaml . }}
{{- end }}
{{- end -}}
