-- Sends each line of a file as the body of a POST, in order, again and again, on all connections.
-- Adds up what the answers tell of themselves: tokens, and where the time went (Server-Timing); and
-- how many answers, with how many tokens, came in each second of the clock.
-- Prints everything as one line of JSON at the end.
--
--     wrk -t1 -c8 -d20s --timeout 300s -s load.lua URL -- BODIES

local bodies, at = {}, 0
local worker
spent, answers_in, tokens_in = {}, {}, {}  -- global, so that done() finds them

function setup(thread)
  worker = thread
end

function init(args)
  local headers = { ["Content-Type"] = "application/json" }
  for line in io.lines(args[1]) do
    bodies[#bodies + 1] = wrk.format("POST", nil, headers, line)
  end
end

function request()
  at = at % #bodies + 1
  return bodies[at]
end

function response(status, headers, body)
  if status ~= 200 then return end
  -- Beside the results, which may be long.
  local usage = body:match('"usage":{[^}]*}') or ""
  local now = os.time()
  answers_in[now] = (answers_in[now] or 0) + 1
  tokens_in[now] = (tokens_in[now] or 0) + tonumber(usage:match('_tokens": ?(%d+)') or 0)
  for name, millis in (headers["server-timing"] or ""):gmatch("(%w+);dur=([%d.]+)") do
    spent[name] = (spent[name] or 0) + tonumber(millis)
  end
end

function done(summary, latency, requests)
  local histogram, timing, seconds = {}, {}, {}
  for i = 1, #latency do
    local micros, count = latency(i)
    histogram[i] = string.format("[%d,%d]", micros, count)
  end
  for name, millis in pairs(worker:get("spent")) do
    timing[#timing + 1] = string.format('"%s":%.1f', name, millis)
  end
  local tokens = worker:get("tokens_in")
  for second, n in pairs(worker:get("answers_in")) do
    seconds[#seconds + 1] = string.format("[%d,%d,%d]", second, n, tokens[second])
  end
  local errors = summary.errors
  print(string.format(
    '{"micros":%d,"requests":%d,"refused":%d,"broken":%d,"seconds":[%s],"spent_ms":{%s},'
      .. '"histogram":[%s]}',
    summary.duration, summary.requests, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    table.concat(seconds, ","), table.concat(timing, ","), table.concat(histogram, ",")))
end
